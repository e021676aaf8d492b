"""python -m xpo.judges: what it writes and shows of judges, and bad input."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xpo.judges.__main__ import main


def rows_in(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xpo.judges", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_two_judges_on_a_preference_data_set(tmp_path: Path) -> None:
    rows = [
        {"prompt": "How are you?", "chosen": f"I love day {i}, it is wonderful!", "rejected": f"Day {i} is awful."}
        for i in range(12)
    ]
    rows.append({"prompt": "And you?", "chosen": "Terrible, I hate this.", "rejected": "Great, what a lovely day!"})
    done = command(tmp_path, "judge=reward", "judge@other=lexicon", f"pairs={rows_in(tmp_path, *rows)}")
    assert done.returncode == 0, done.stderr
    for words in ("reward (embedded)", "lexicon", "92.3 %", "Calibration of", "Cohen's kappa", "flips between orders"):
        assert words in done.stdout
    (out,) = (tmp_path / "outputs" / "judges").glob("*/*")
    report = json.loads((out / "report.json").read_text())
    assert report["other"]["accuracy"]["value"] == pytest.approx(12 / 13)
    assert report["other"]["flips"]["value"] == 0
    assert sum(map(sum, report["agreement"]["table"])) == 13
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 13
    assert {"prompt", "first", "second", "winner", "judge", "other", "judge_flipped"} <= set(verdicts[0])
    assert (out / "calibration.png").stat().st_size > 5000


JUDGES = """
import torch
from xpo.config.errors import JudgeStopped
from xpo.judges import Judge, PairwiseJudge

class FirstWins(PairwiseJudge):
    def preferences(self, prompts, first, second):
        return torch.full((len(prompts),), 2.0)

class Breaks(Judge):
    def __init__(self):
        self.calls = 0

    def margins(self, prompts, first, second):
        self.calls += 1
        if self.calls > 2:  # the first pairs, in both orders
            raise JudgeStopped("judge.budget=2 is used up; raise it")
        return torch.tensor([float("nan")] + [1.0] * (len(prompts) - 1))
"""


def test_position_bias_invalid_verdicts_and_a_judge_that_stops(tmp_path: Path) -> None:
    (tmp_path / "my_judges.py").write_text(JUDGES)
    pairs = rows_in(tmp_path, *[{"prompt": str(i), "first": "a", "second": "b"} for i in range(300)])
    for group, name in {"first_wins": "FirstWins", "breaks": "Breaks"}.items():
        (tmp_path / "conf" / "judge").mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / "judge" / f"{group}.yaml").write_text(f"_target_: my_judges.{name}\n")
    done = command(
        tmp_path,
        "judge=first_wins",
        "judge@other=breaks",
        f"pairs={pairs}",
        f"hydra.searchpath=[file://{tmp_path}/conf]",
        "hydra.run.dir=out",
    )
    assert done.returncode == 1
    assert "judge.budget=2 is used up" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["judge"]["flips"]["value"] == 1
    assert report["judge"]["ties"]["value"] == 1  # both orders cancel
    assert report["other"]["pairs"] == 256  # a chunk; of the next one it could not judge all
    assert report["other"]["invalid"]["value"] == pytest.approx(1 / 256)
    assert report["other"]["flips"]["value"] == 1  # it always favours the first
    assert not (tmp_path / "out" / "calibration.png").exists()


def test_a_drawn_order_shows_no_flips(tmp_path: Path) -> None:
    (tmp_path / "my_judges.py").write_text(JUDGES)
    (tmp_path / "conf" / "judge").mkdir(parents=True)
    (tmp_path / "conf" / "judge" / "first_wins.yaml").write_text("_target_: my_judges.FirstWins\nboth_orders: false\n")
    pairs = rows_in(tmp_path, *[{"prompt": str(i), "first": "a", "second": "b"} for i in range(20)])
    done = command(
        tmp_path,
        "judge=first_wins",
        "judge@other=length_controlled",
        "judge@other.judge=first_wins",
        "other.coefficient=0.0",
        f"pairs={pairs}",
        f"hydra.searchpath=[file://{tmp_path}/conf]",
        "hydra.run.dir=out",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert [report[key]["flips"]["cases"] for key in ("judge", "other")] == [0, 0]
    assert report["judge"]["ties"]["value"] == 0


@pytest.fixture
def root_logger() -> Iterator[None]:
    """What Hydra changes of logging, in this process, is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge=lexicon"], "pairs has no value; give one with pairs=..."),
        (["judge=lexicon", "pairs="], "pairs='' names no data; give a file, a directory or a hub data set"),
        (["judge=lexikon", "pairs=x.jsonl"], "judge=lexikon does not exist; did you mean 'lexicon'?"),
        (["pair=x.jsonl"], "unknown config key 'pair'; did you mean 'pairs'?"),
        (["pairs=x.jsonl"], "pairs='x.jsonl' does not exist"),
        (["pairs=x.jsonl", "limit=0"], "limit=0 is too small"),
        (["pairs=x.jsonl", "reward_model=none"], "judge=reward needs a reward model"),
        (["pairs=x.jsonl", "judge=random", "judge.sed=1"], "judge.sed"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["xpo.judges", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("xpo: error: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1
