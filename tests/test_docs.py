"""What README and documentation say is so: every command and every block of code is checked.

A command of ours is composed as it stands, or parsed by its own parser, in this process; some run for real, below. Of
other programs (`OTHERS`) only the words are split: they need a network, another machine or another tool.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import option_pages
import pytest
import yaml
from conftest import EVAL_METRICS, OWN_METRICS, TRL_METRICS, prompts
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pair_rm_checkpoint import build_tiny_pair_rm
from transformers import TrainingArguments

import xpo.chat
import xpo.compare
import xpo.judges.__main__
import xpo.pairs
import xpo.push
import xpo.reference
import xpo.runs
import xpo.track
from xpo import XPOConfig, XPOTrainer
from xpo.config.compose import CONF, check_complete, checked, choose_preset, compose
from xpo.config.options import keys
from xpo.config.schema import GROUPS
from xpo.evaluation.probe import MEASURES
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.tracking.metrics_log import read_metrics

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {".", "cd", "git", "pip", "pre-commit", "hf"}
LANGUAGES = {"sh", "python", "json", "yaml", "text", "{toctree}", "{eval-rst}"}
HYDRA = re.compile(r"hydra[./](launcher|sweeper)")  # of plugins that need not be installed


def blocks(page: Path, language: str = r"\S*") -> Iterator[tuple[str, str]]:
    """The fenced blocks of a page: language and content."""
    yield from re.findall(rf"^```({language})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def block(page: str, language: str, containing: str) -> str:
    """The one block of a page in a language that contains some words."""
    (found,) = [text for _, text in blocks(ROOT / page, language) if containing in text]
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command: of shell blocks, and in output and running text what begins with `python -m`. Once each."""
    seen = set()
    for page in PAGES:
        lines = [line for _, text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
        lines += [line for _, text in blocks(page, "text") for line in re.findall(r"python -m .*", text)]
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for line in [*lines, *re.findall(r"`(python -m [^`]+)`", prose)]:
            words = [word for word in shlex.split(line, comments=True) if not word.endswith("...")]
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                if shlex.join(command) not in seen:
                    seen.add(shlex.join(command))
                    yield page.name, command


COMMANDS = list(commands())


def composes(words: list[str]) -> None:
    """What `python -m xpo.train` makes of a command is checked as it would; of a sweep, its first and last job."""
    words = [word for word in words if word not in ("-m", "--cfg", "job", "--help") and not HYDRA.match(word)]
    sweeps = [one for one in OverridesParser.create().parse_overrides(words) if one.is_sweep_override()]
    ends = {one.input_line: list(one.sweep_string_iterator()) for one in sweeps}
    for end in (0, -1):
        job = [f"{w.partition('=')[0]}={ends[w][end]}" if w in ends else w for w in words]
        checked(compose(choose_preset(job))[0])


def composes_inspection(words: list[str]) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("inspect", overrides=words)
    check_complete(config)
    OmegaConf.to_object(config)


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A command in this process, to a good end."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    status: Any = 0
    try:
        module.main()
    except SystemExit as ended:
        status = ended.code
    assert not status


def parses(module: Any, stop_at: str) -> Callable[[list[str]], None]:
    """A check by a command's own `main`, which ends where it would begin to work."""

    def check(words: list[str]) -> None:
        def stop(*given: Any, **_: Any) -> None:
            if module is xpo.chat:
                composes(["experiment=none", *given[1]])
            sys.exit(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, stop_at, stop)
            run(module, patch, *words)

    return check


OURS: dict[str, Callable[[list[str]], None]] = {
    "xpo.train": composes,
    "xpo.judges": composes_inspection,
    "xpo.chat": parses(xpo.chat, "find_trained"),
    "xpo.compare": parses(xpo.compare, "find_sweep"),
    "xpo.pairs": parses(xpo.pairs, "pair_files"),
    "xpo.push": parses(xpo.push, "push_later"),
    "xpo.reference": parses(xpo.reference, "fill"),
    "xpo.runs": parses(xpo.runs, "runs_below"),
    "xpo.track": parses(xpo.track, "lacks"),
}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_command_works(
    page: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As it stands; where a sentence names a command and no more, its --help."""
    monkeypatch.chdir(tmp_path)
    write_the_example_judge(tmp_path)
    command = [word.replace("$PWD", str(tmp_path)) for word in command]
    if command[0] == "make":
        assert re.search(rf"^{command[1]}: .*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif command[0] in ("python", "torchrun"):
        module, *words = command[command.index("-m") + 1 :]
        OURS[module](words if words or module in ("xpo.train", "xpo.compare", "xpo.runs") else ["--help"])
    else:
        assert command[0] in OTHERS


def test_every_block_says_what_it_is():
    """No command hides in an indented block, or in one that nothing checks."""
    for page in PAGES:
        for language, text in blocks(page):
            assert language in LANGUAGES, (page.name, language, text)
            if language == "python":
                compile(text, page.name, "exec")
            elif language == "yaml":
                yaml.safe_load(text)
            elif language == "json":
                json.loads(text)
            elif language == "text":
                assert not re.search(r"^(\$|make|pip|torchrun) ", text, re.MULTILINE), text
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"\n\n    \S", prose), page.name


# ---- for real ----------------------------------------------------------------------------------


def write_the_example_judge(directory: Path) -> None:
    """Its class and its YAML file, as they stand in the documentation."""
    (directory / "my_judges.py").write_text(block("docs/extending.md", "python", "ShorterJudge"))
    (directory / "my_conf" / "judge").mkdir(parents=True)
    (directory / "my_conf" / "judge" / "shorter.yaml").write_text(block("docs/extending.md", "yaml", "ShorterJudge"))


def test_the_commands_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Train with the example judge in a directory of one's own, inspect it, chat, export the pairs, compare, replay."""
    write_the_example_judge(tmp_path)
    judge = ["judge=shorter", "judge.per_character=0.05", f"hydra.searchpath=[file://{tmp_path}/my_conf]"]
    words = [*judge, "experiment=smoke", "tracking=none", "hydra.run.dir=trained"]
    command = [sys.executable, "-m", "xpo.train", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "trained")[-1]["eval_invalid_rate"] == 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    completions = next(Path("trained/completions").glob("step_*.json"))
    run(xpo.judges.__main__, monkeypatch, *judge, f"pairs={completions}", "hydra.run.dir=inspected")
    verdicts = [json.loads(line) for line in Path("inspected/verdicts.jsonl").read_text().splitlines()]
    assert verdicts
    for verdict in verdicts:
        margin = 0.05 * (len(verdict["second"]) - len(verdict["first"]))
        assert abs(verdict["judge"] - margin) < 1e-5

    run(xpo.chat, monkeypatch, "trained", "--prompt", "How are you?", "generation.max_new_tokens=4")
    assert re.search(r"^shorter: (policy|reference|tie)", capsys.readouterr().out, re.MULTILINE)
    run(xpo.pairs, monkeypatch, "export", "trained")
    assert Path("pairs.parquet").exists()
    run(xpo.compare, monkeypatch, "trained", "trained", "--no-log", "--out", "report")
    assert Path("report/report.html").exists()
    run(xpo.runs, monkeypatch, ".")
    assert re.search(r"trained .*finished", capsys.readouterr().out)
    run(xpo.track, monkeypatch, "replay")
    assert "nothing to send" in capsys.readouterr().out


def test_the_library_in_fifteen_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The README's, with a tiny model, data and judge in place of those of the hub."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    judge, _ = build_tiny_pair_rm(tmp_path / "judge")
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"train": prompts(8, chat=True), "test": prompts(4)})
    code = block("README.md", "python", "XPOTrainer")
    for there, here in {
        "Qwen/Qwen2-0.5B-Instruct": str(tmp_path / "model"),
        "Qwen2-0.5B-XPO": str(tmp_path / "out"),
        "PairRMJudge()": f"PairRMJudge({str(judge)!r})",
        "beta=0.1": "beta=0.1, max_steps=1, max_new_tokens=4, use_cpu=True, disable_tqdm=True",
    }.items():
        assert there in code
        code = code.replace(there, here)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 1


def test_the_reward_functions_score():
    """Right answers; shouting."""
    page = ROOT / "docs" / "rewards.md"
    (right, loud) = [text for _, text in blocks(page, "python")]
    names: dict[str, Any] = {}
    exec(right, names)
    assert names["reward"](["it is 4", "5"], ["4", "4"]) == [1.0, 0.0]
    exec(loud, names)
    assert names["reward"]([[{"content": "NO"}], [{"content": "no"}]], prompts=None) == [1.0, 0.0]


# ---- lists that must be whole ------------------------------------------------------------------


def test_every_metric_is_documented_and_no_other():
    """Training's by their first column, and evaluations' below theirs."""
    training, evaluation = (ROOT / "docs" / "metrics.md").read_text().split("## Evaluations")

    def listed(text: str) -> set[str]:
        rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}

    code = "".join(path.read_text() for path in (ROOT / "xpo").rglob("*.py"))
    sometimes = set(re.findall(r'"((?:replay|preference|perf|completions)/\w+)"', code))
    assert "replay/age" in sometimes
    assert listed(training) == TRL_METRICS | OWN_METRICS | sometimes | {"epoch"}
    assert listed(evaluation) == EVAL_METRICS | {*MEASURES, "flip_rate", "runtime"}


def test_every_key_has_a_meaning():
    """A line in its group's files, or that of transformers."""
    theirs = {one.name for one in fields(TrainingArguments)}
    for group in GROUPS:
        meant = option_pages.meanings(group.group())
        assert meant.keys() <= {key.name for key in keys(group)}, group
        lacking = {key.name for key in keys(group)} - meant.keys()
        assert lacking <= (theirs if group.group() == "training" else set()), group
    page = option_pages.markdown()
    assert "### `loss.missing_eos_penalty`\n\nnumber or null · default `null` · above 0" in page
    assert str(Path.home()) not in page


def test_the_table_of_trl_names_what_is_there():
    """`same` and `other meaning` are arguments here, `absent` and `other name` are not, or are None."""
    config, trainer = (ROOT / "docs" / "trl.md").read_text().split("## XPOTrainer")
    here = {one.name for one in fields(XPOConfig)} | {"trust_remote_code"}
    rows = re.findall(r"^\| `(\w+)` \| (same|other meaning|other name|absent) \|", config, re.MULTILINE)
    assert len(rows) > 30
    for name, what in rows:
        assert (name in here) == (what in ("same", "other meaning") or name == "use_vllm"), name
    taken = set(XPOTrainer.__init__.__annotations__)
    for name, _ in re.findall(r"^\| `(\w+)` \| (same|absent) \|", trainer, re.MULTILINE):
        assert name in taken, name


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    bullets = re.findall(r"^- .*(?:\n  .*)*", "\n".join(lines), re.MULTILINE)
    assert max([bullet.count("\n") + 1 for bullet in bullets], default=0) <= 2
    assert all(len(line) <= 125 or line.startswith(("|", "Apache")) for line in lines)
