"""Pairs to be judged: every layout of a preference data set, and rows that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from xpo.config.errors import ConfigError
from xpo.data.pairs import load_pairs
from xpo.tracking.completions import completion_rows, write_table

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


def test_completions_of_a_run_have_the_winner_of_its_judge(tmp_path: Path) -> None:
    records = [{"prompt": "p", "completion": "a", "reference": "b", "label": label} for label in (1.0, -1.0, 0.0)]
    write_table(tmp_path / "step_000003.json", completion_rows(records, 3))
    assert [pair.winner for pair in load_pairs(str(tmp_path / "step_000003.json"))] == [1, -1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "first": "a"}, "row 0 has no second"),
        ({"text": "p"}, "has no prompt and no first and no second (it has text)"),
        ({"chosen": "a", "rejected": "b"}, "row 0 has no prompt; add the column"),
        ({"chosen": [USER, answer("a")], "rejected": [answer("b")]}, "begin with different messages"),
        ({"prompt": "p", "chosen": [USER, answer("a"), USER], "rejected": [USER, answer("b")]}, "has 2 messages"),
        ({"prompt": 5, "first": "a", "second": "b"}, "row 0: prompt=5 is neither text nor a list of messages"),
        ({"prompt": ["p"], "chosen": "a", "rejected": "b"}, "row 0: prompt=['p'] is neither text nor a list"),
        ({"prompt": "p", "first": "a", "second": "b", "winner": "a"}, "winner='a' is not one of first, second, tie"),
    ],
)
def test_other_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pairs(rows_in(tmp_path, row))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
