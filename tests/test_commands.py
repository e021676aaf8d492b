"""Every command of README and documentation: it composes as it stands, and it runs, made small.

What a command is about stays: its presets, groups, judges and values. What it needs a hub, a server or hours for is
replaced (`STAND_INS`, `SMALL`): models are tiny, prompts are files, the servers are on this machine. Jobs train in this
process. Of other programs (`OTHERS`) only the words are split: they need a network, another machine or another tool.
"""

import glob
import gzip
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import restored
from hub_server import serving
from hydra.core.override_parser.overrides_parser import OverridesParser
from llm_server import LLMServer, sharpened
from omegaconf import OmegaConf
from pair_rm_checkpoint import build_tiny_pair_rm
from test_docs import PAGES, ROOT, block, blocks
from transformers import LlamaConfig, LlamaForSequenceClassification
from vllm_run import policy

import xpo.chat
import xpo.compare
import xpo.judges.__main__
import xpo.launch.sweep
import xpo.pairs
import xpo.push
import xpo.reference
import xpo.runs
import xpo.track
import xpo.train
from xpo.config.compose import CONF, check_complete, checked, choose_preset, compose
from xpo.launch import worker
from xpo.launch.processes import Outcome
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.tracking.metrics_log import read_metrics
from xpo.tracking.runs import all_runs, last_complete_checkpoint

OTHERS = {".", "cd", "git", "pip", "pre-commit", "hf"}
PLUGINS = re.compile(r"hydra[./](launcher|sweeper)")  # words of those that need not be installed


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
PROGRAMS = ("python", "torchrun")  # which run modules of ours
OURS = [(page, words[words.index("-m") + 1 :]) for page, words in COMMANDS if words[0] in PROGRAMS]


def name_of(value: str | list[str]) -> str:
    """What pytest calls a case: its page and its words."""
    return value if isinstance(value, str) else " ".join(value)


# ---- as they stand -----------------------------------------------------------------------------


def composes(words: list[str]) -> None:
    """What `python -m xpo.train` makes of a command is checked as it would; of a sweep, its first and last job."""
    words = [word for word in words if word not in ("-m", "--cfg", "job", "--help") and not PLUGINS.match(word)]
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


COMPOSED = {"xpo.train": composes, "xpo.judges": composes_inspection}


@pytest.mark.parametrize(("page", "words"), [one for one in OURS if one[1][0] in COMPOSED], ids=name_of)
def test_every_command_composes(page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_the_example_judge(tmp_path)
    COMPOSED[words[0]]([word.replace("$PWD", str(tmp_path)) for word in words[1:]])


@pytest.mark.parametrize(("page", "words"), [one for one in COMMANDS if one[1][0] not in PROGRAMS], ids=name_of)
def test_every_other_command_is_known(page: str, words: list[str]):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}: .*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert words[0] in OTHERS


# ---- for real ----------------------------------------------------------------------------------

# Beside a command's own words, which win.
SMALL = ["training.max_steps=1", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1"]
SMALL += ["training.disable_tqdm=true", "generation.max_new_tokens=4", "generation.max_length=512", "model=tiny"]
SMALL += ["data.train_limit=8", "data.eval_limit=2", "evaluation.probe_prompts=2", "tracking=none", "judge=lexicon"]
SMALL += ["sweep.seeds=1"]
STAND_INS = {
    "data=ultrafeedback": "data=embedded",
    "data.train=owner/name": "data.train=prompts",
    "data.eval=owner/name": "data.eval=prompts",
    "reward_model.model=owner/name": "reward_model.model=classifier",
    "owner/name": "model",
    "model.reference=owner/other": "model.reference=model",
    "tracking.uri=http://localhost:5000": "tracking.uri=sqlite:///mlflow.db",
    "sweep.seeds=3": "sweep.seeds=2",
    "launch.num_processes=8": "launch.num_processes=2",
    "elsewhere/outputs": "multirun",
    "training.resume=outputs/2026-11-27/02-40-13": "training.resume=outputs/DATE/TIME",
}
STAND_INS |= {  # of a real run
    "pairs=outputs/DATE/TIME/completions/step_000018.json": "pairs=outputs/DATE/TIME/completions/step_000001.json",
    "training.max_steps=-1": "training.max_steps=6",
    "training.gradient_accumulation_steps=16": "training.gradient_accumulation_steps=1",
    "generation.max_new_tokens=512": "generation.max_new_tokens=4",
}
TOGETHER = ("deepspeed=", "launch.num_processes=")  # words of jobs of several processes
RUNS = (
    ["hydra.run.dir=outputs/DATE/TIME"],
    ["training.seed=2", "hydra.run.dir=outputs/DATE/OTHER"],
    ["-m", "training.seed=3,4", "hydra.sweep.dir=multirun/DATE/TIME"],
)


def write_the_example_judge(directory: Path) -> None:
    """Its class and its YAML file, as they stand in the documentation."""
    (directory / "my_judges.py").write_text(block("docs/extending.md", "python", "ShorterJudge"))
    (directory / "my_conf" / "judge").mkdir(parents=True)
    (directory / "my_conf" / "judge" / "shorter.yaml").write_text(block("docs/extending.md", "yaml", "ShorterJudge"))


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A command in this process, to a good end."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    status: Any = 0
    try:
        module.main()
    except SystemExit as ended:
        status = ended.code
    assert not status


class InThisProcess:
    """In place of a job's process."""

    def __init__(self, run_dir: Path, *_: Any):
        self.run_dir = run_dir

    def wait(self) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            run(worker, patch, str(self.run_dir))
        return Outcome("finished", 0)


class InThisThread(Executor):
    """In place of the threads that wait for jobs."""

    def __init__(self, _: int):
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:  # type: ignore[override]
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def train_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Jobs start no processes."""
    patch.setattr(xpo.train, "start_worker", lambda run_dir: InThisProcess(run_dir).wait().status)
    patch.setattr(xpo.launch.sweep, "JobProcess", InThisProcess)
    patch.setattr(xpo.launch.sweep, "ThreadPoolExecutor", InThisThread)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and runs that commands name."""
    place = tmp_path_factory.mktemp("workplace")
    rows = [{"prompt": f"Tell me about number {i}"} for i in range(8)]
    for name in ("prompts.jsonl", "heldout.jsonl", "prompts/train.jsonl", "prompts/test.jsonl"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "parts").mkdir()
    (place / "parts" / "one.jsonl.gz").write_bytes(gzip.compress((place / "prompts.jsonl").read_bytes()))
    pairs = [row | {"chosen": " Good.", "rejected": " This is bad."} for row in rows]
    for name in ("pairs.jsonl", "chat.jsonl"):
        (place / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_the_example_judge(place)
    (place / "my_module.py").write_text(
        "def my_reward(prompts, completions):\n    return [float(len(text)) for text in completions]\n\n\n"
        "def my_judge(prompts, first, second):\n    return [float(len(a) - len(b)) for a, b in zip(first, second)]\n"
    )
    shutil.copytree(build_tiny_pair_rm(place / "pair_rm")[0], place / "models" / "PairRM-hf")
    for name in ("model", "models/Qwen2-0.5B-Instruct", "classifier"):
        network: Any = sharpened(tiny_model(), 6)
        if name == "classifier":
            network = LlamaForSequenceClassification(
                LlamaConfig(**network.config.to_dict() | {"id2label": {0: "score"}, "label2id": {"score": 0}})
            )
        network.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    for words in RUNS:
        with restored(), pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            train_in_this_process(patch)
            run(xpo.train, patch, *words, *SMALL, "training.save_steps=1")
    return place


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files and runs, which is the current directory; the hub is on this machine."""
    here = tmp_path / "here"
    shutil.copytree(workplace, here)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    return here


def wide_model(here: Path) -> str:
    """An override, for vLLM, whose attention on CPUs knows no heads as small as the tiny model's."""
    policy().save_pretrained(here / "wide")
    tiny_tokenizer().save_pretrained(here / "wide")
    return "model.name=wide"


def params(commands: list[tuple[str, list[str]]]) -> list[Any]:
    """Pages and words, marked where they need vLLM."""
    return [
        pytest.param(page, words, marks=[pytest.mark.vllm] if "generation=vllm" in words else [])
        for page, words in commands
    ]


def made_small(words: list[str], here: Path, llm: str) -> list[str]:
    """The words of a training command, for seconds, with what is here in place of what is elsewhere.

    Its model is always the tiny one. Words of launchers before `-m xpo.train` are not run.
    """
    if "--multi_gpu" in " ".join(words):  # which starts one process per GPU
        words = [word.replace("--multi_gpu", "--cpu").replace("num_processes=8", "num_processes=1") for word in words]
    words = [STAND_INS.get(word, word.replace("$PWD", str(here))) for word in words]
    words = [word for word in words if not PLUGINS.match(word) and not word.startswith("model=")]
    if {"--cfg", "--help"}.intersection(words):
        return words
    given = " ".join(words)
    axes = [word for word in words if re.search(r"=[^\[]+,", word)]
    for axis in axes:  # a sweep of two jobs, or of one
        key, *values = re.split("[=,]", axis)
        two = axis is axes[0] and not any(word.startswith(TOGETHER) for word in words)
        words[words.index(axis)] = f"{key}={values[0]},{values[-1]}" if two else f"{key}={values[-1]}"
    if "training.resume=outputs/DATE/TIME" in words:  # whose first step is done
        words.append("training.max_steps=2")
    if re.search("training.iterations|algorithm_1|selm", given):  # three iterations, two updates each
        words.append("training.max_steps=6")
    keys = {word.partition("=")[0] for word in words}
    small = [word for word in SMALL if word.partition("=")[0] not in keys]
    if "data.eval=null" in words:
        small = [word for word in small if word not in ("data.eval_limit=2", "evaluation.probe_prompts=2")]
    if "tracking.uri" in given:
        small.remove("tracking=none")
    if "experiment=ultrafeedback" in given:
        small.append("data=embedded")
        small.remove("judge=lexicon")
        small.append("reward_model.model=classifier" if "reward" in given else "judge.model=models/PairRM-hf")
    if "judge=pair_rm" in words and "judge.model" not in given:
        words.append("judge.model=models/PairRM-hf")
    if "training.torch_compile=true" in words:  # traced; nothing is generated, which takes half a minute
        words.append("+training.kwargs.torch_compile_backend=eager")
    if "judge@judge.judge=pair_rm" in given:
        words.append("judge.judge.model=models/PairRM-hf")
    if "generation=vllm" in words:
        small.append(wide_model(here))
    if "judge=llm" in words:
        small.append(f"judge.base_url={llm}")
    return words + small


TRAININGS = [(page, words[1:]) for page, words in OURS if words[0] == "xpo.train"]
NO_TRAININGS = [(page, words) for page, words in OURS if words[0] != "xpo.train"]


@pytest.mark.parametrize(("page", "words"), params(TRAININGS), ids=name_of)
def test_every_training_runs(page: str, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("vllm", "wandb"):
        if re.search(rf"\b{package}\b", " ".join(words)):
            pytest.importorskip(package, reason=f"{package} is not installed; for vLLM: make test-vllm")
    if not any(word.startswith(TOGETHER) for word in words):
        train_in_this_process(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # as in an activated environment
    before = [run_dir for run_dir, _ in all_runs([here])]
    with LLMServer() as llm, serving(monkeypatch, str(here / "cache")) as hub:
        small = made_small(words, here, llm.url)
        run(xpo.train, monkeypatch, *small)
    if not {"--help", "--cfg"}.intersection(words):
        runs = all_runs([here])
        assert all(record.finished for _, record in runs)
        assert len(runs) > len(before) or "training.resume" in " ".join(small)
    if "training.resume=outputs/DATE/TIME" in small:
        assert last_complete_checkpoint(here / "outputs" / "DATE" / "TIME" / "model").name == "checkpoint-2"
    if "wandb" in " ".join(words):  # as it does when a process ends
        importlib.import_module("wandb").teardown()
    if "training.push_to_hub=true" in words:
        assert "models/owner/name" in hub.repositories


# What else each of the other commands is given, and a file that it leaves.
OTHER_COMMANDS: dict[str, tuple[Any, list[str], str | None]] = {
    "xpo.chat": (xpo.chat, ["--prompt", "How are you?", "generation.max_new_tokens=4"], None),
    "xpo.judges": (xpo.judges.__main__, ["limit=2", "hydra.run.dir=inspected"], "inspected/verdicts.jsonl"),
    "xpo.compare": (xpo.compare, ["--no-log", "--out", "report"], "report/report.html"),
    "xpo.pairs": (xpo.pairs, [], "pairs.parquet"),
    "xpo.push": (xpo.push, [], None),
    "xpo.reference": (xpo.reference, ["generation.max_new_tokens=4", "data.train_limit=8"], None),
    "xpo.runs": (xpo.runs, [], None),
    "xpo.track": (xpo.track, [], None),
}
OTHER_WORDS = {
    "--judge pair_rm": "--judge pair_rm judge.model=models/PairRM-hf",
    "judge=pair_rm": "judge=pair_rm judge.model=models/PairRM-hf",
    "judge=local_llm": "judge=local_llm judge.model=model",
}


@pytest.mark.parametrize(("page", "words"), params(NO_TRAININGS), ids=name_of)
def test_every_other_command_of_ours_runs(page: str, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a sentence names a command and no more, its --help."""
    module, more, left = OTHER_COMMANDS[words[0]]
    if "generation=vllm" in words:
        pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")
        more = [*more, wide_model(here)]
    given = [STAND_INS.get(word, word.replace("$PWD", str(here))) for word in words[1:]]
    line = shlex.join(name for word in given for name in (sorted(glob.glob(word)) if "*" in word else [word]))
    for there, stand_in in OTHER_WORDS.items():
        line = line.replace(there, stand_in)
    with serving(monkeypatch, str(here / "cache")) as hub:
        if not line and words[0] not in ("xpo.compare", "xpo.runs"):
            run(module, monkeypatch, "--help")
            return
        to = ["--to", "owner/name"] if words[0] == "xpo.push" else []
        run(module, monkeypatch, *shlex.split(line), *more, *to)
        assert not to or "models/owner/name" in hub.repositories
    assert left is None or (here / left).exists()


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
