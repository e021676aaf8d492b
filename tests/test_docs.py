"""What README and documentation say is so: every block of code, table and list. Commands: test_commands.py."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import option_pages
import pytest
import yaml
from conftest import EVAL_METRICS, OWN_METRICS, TRL_METRICS, prompts
from pair_rm_checkpoint import build_tiny_pair_rm
from transformers import TrainingArguments

from xpo import XPOConfig, XPOTrainer
from xpo.config.options import keys
from xpo.config.schema import GROUPS
from xpo.evaluation.probe import MEASURES
from xpo.models.loading import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "json", "yaml", "text", "{toctree}", "{eval-rst}"}


def blocks(page: Path, language: str = r"\S*") -> Iterator[tuple[str, str]]:
    """The fenced blocks of a page: language and content."""
    yield from re.findall(rf"^```({language})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def block(page: str, language: str, containing: str) -> str:
    """The one block of a page in a language that contains some words."""
    (found,) = [text for _, text in blocks(ROOT / page, language) if containing in text]
    return found


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
