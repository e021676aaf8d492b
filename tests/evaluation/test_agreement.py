"""What a judge is worth: the figures against numbers derived by hand, pairs from files, and the command."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xpo.config.errors import ConfigError
from xpo.data.pairs import load_pairs
from xpo.evaluation.agreement import accuracy, agreement, calibration, share
from xpo.judges.__main__ import main

NAN = math.nan
LOG_3 = math.log(3)


def test_accuracy_is_over_the_pairs_that_are_decided_and_known() -> None:
    """Right, wrong, right; a tie, an invalid verdict, an infinite one, and an unknown winner do not count."""
    margin = torch.tensor([1.0, 1.0, -2.0, 0.0, NAN, math.inf, 3.0])
    winner = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 0.0])
    assert accuracy(margin, winner)[:2] == (pytest.approx(2 / 3), 3)


def test_the_interval_is_wilsons() -> None:
    """8 of 10: Wilson's 95 % interval is 0.490 to 0.943 (Wilson 1927)."""
    eight = share(torch.tensor([True] * 8 + [False] * 2))
    assert eight == (0.8, 10, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert share(torch.tensor([True] * 10)).high == pytest.approx(1)
    assert math.isnan(share(torch.tensor([], dtype=torch.bool)).value)


def test_calibration_by_hand() -> None:
    """Eight pairs at probability 3/4 (margin log 3), of which six are right: calibrated, temperature 1."""
    margin = torch.tensor([LOG_3, -LOG_3] * 4)
    winner = margin.sign()
    winner[:2] *= -1
    fit = calibration(margin, winner, bins=10)
    assert [(b.pairs, round(b.confidence, 3), b.accuracy) for b in fit.bins] == [(8, 0.75, 0.75)]
    assert fit.error == pytest.approx(0, abs=1e-7)
    assert fit.temperature == pytest.approx(1, rel=1e-3)
    doubled = calibration(2 * margin, winner)  # odds 9:1, so overconfident: 0.9 - 0.75
    assert doubled.error == pytest.approx(0.15, abs=1e-6)
    assert doubled.temperature == pytest.approx(2, rel=1e-3)


def test_calibration_without_anything_to_fit() -> None:
    assert math.isnan(calibration(torch.tensor([NAN]), torch.tensor([1.0])).error)
    assert math.isnan(calibration(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])).temperature)  # never wrong
    assert math.isnan(calibration(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -1.0])).temperature)  # never right


def test_kappa_by_hand() -> None:
    """Wins 4+1 | 1+4 of ten: same 8/10, by chance 1/2: kappa (0.8 - 0.5) / 0.5 = 0.6."""
    one = torch.tensor([1.0] * 5 + [-1.0] * 5 + [NAN])
    two = torch.tensor([2.0] * 4 + [-2.0] + [3.0] + [-0.1] * 4 + [1.0])
    same, kappa, table = agreement(one, two)
    assert same[:2] == (0.8, 10)
    assert kappa == pytest.approx(0.6)
    assert table == [[4, 0, 1], [0, 0, 0], [1, 0, 4]]
    assert math.isnan(agreement(torch.ones(3), torch.ones(3)).kappa)
    assert agreement(torch.zeros(2), torch.tensor([0.0, 1.0])).table == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]


# ---- pairs -----------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rows_in(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "hi", "chosen": "good", "rejected": "bad"}, "hi"),
        ({"chosen": [USER, answer("good")], "rejected": [USER, answer("bad")]}, [USER]),
        ({"prompt": "hi", "chosen": [USER, answer("good")], "rejected": [USER, answer("bad")]}, "hi"),
        ({"prompt": [USER], "chosen": [answer("good")], "rejected": [answer("bad")]}, [USER]),
    ],
    ids=["text", "implicit", "binarized", "explicit"],
)
def test_preference_data_sets(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    (pair,) = load_pairs(rows_in(tmp_path, row))
    assert pair.prompt == prompt
    assert {pair.first: pair.winner, pair.second: -pair.winner} == {"good": 1, "bad": -1}


def test_the_chosen_one_is_first_in_about_half_of_the_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": "good", "rejected": "bad"} for i in range(400)]
    name = rows_in(tmp_path, *rows)
    assert 160 < sum(pair.winner > 0 for pair in load_pairs(name)) < 240
    assert load_pairs(name) == load_pairs(name)
    assert load_pairs(name) != load_pairs(name, seed=1)
    assert len(load_pairs(name, limit=7)) == 7


def test_completions_without_a_winner(tmp_path: Path) -> None:
    row = {"prompt": "p", "first": "a", "second": "b"}
    rows = [row | {"winner": winner} for winner in ("first", "second", "tie", None)]
    assert [pair.winner for pair in load_pairs(rows_in(tmp_path, *rows))] == [1, -1, 0, 0]
    table = {"columns": ["prompt", "step", "completion", "reference"], "data": [["p", 3, "a", "b"]]}
    (tmp_path / "step_000003.json").write_text(json.dumps(table))
    assert load_pairs(str(tmp_path / "step_000003.json")) == [("p", "a", "b", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "first": "a"}, "row 0 has no second"),
        ({"text": "p"}, "has no prompt and no first and no second (it has text)"),
        ({"chosen": "a", "rejected": "b"}, "row 0 has no prompt; add the column"),
        ({"chosen": [USER, answer("a")], "rejected": [answer("b")]}, "begin with different messages"),
        ({"prompt": "p", "chosen": [USER, answer("a"), USER], "rejected": [USER, answer("b")]}, "has 2 messages"),
        ({"prompt": "p", "first": "a", "second": "b", "winner": "a"}, "winner='a' is not one of first, second, tie"),
    ],
)
def test_other_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pairs(rows_in(tmp_path, row))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the command -----------------------------------------------------------------------------------


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
    assert report["other"]["invalid"]["value"] == pytest.approx(45 / 300)  # one failed, 44 were not asked
    assert report["other"]["flips"]["value"] == 1  # it always favours the first
    assert not (tmp_path / "out" / "calibration.png").exists()


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
