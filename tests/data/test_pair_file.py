"""The pairs of a run on disk, and the preference data set that they become."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from xpo.config.errors import ConfigError
from xpo.data.pair_file import PairFile, export, pair_files, read_pairs
from xpo.data.pairs import load_pairs

USER = [{"role": "user", "content": "Why?"}]
BEGUN = [*USER, {"role": "assistant", "content": "As"}]


def pair(step: int, prompt: Any = "p", label: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "row": 0,
        "prompt": prompt,
        "first": "one",
        "second": "two",
        "tokens": [[1, 2], [3]],
        "by": ["policy", "reference"],
        "margin": 0.5 * label,
        "winner": {1: "first", -1: "second", 0: "tie"}[label],
        "win_probability": (label + 1) / 2,
        "score": [1.0, None],
        "reference_logps": [-1.0, -2.0],
    } | more


def written(path: Path, *rows: dict[str, Any]) -> PairFile:
    file = PairFile(path)
    file.restore(0)
    file.append(rows)
    return file


def test_a_restored_run_goes_on_from_its_step(tmp_path: Path) -> None:
    """What later steps have left is gone, and a torn line; what comes then stands behind the rest."""
    path = tmp_path / "pairs.jsonl"
    written(path, pair(1), pair(2), pair(2, "q"), pair(3))
    with path.open("ab") as file:
        file.write(b'{"step": 3, "epo')
    assert [row["step"] for row in read_pairs(path)] == [1, 2, 2, 3]
    again = PairFile(path)
    again.restore(2)
    again.append([pair(3, "new")])
    assert [(row["step"], row["prompt"]) for row in read_pairs(path)] == [(1, "p"), (2, "p"), (2, "q"), (3, "new")]
    again.restore(0)
    assert list(read_pairs(path)) == []


def test_a_full_disk_keeps_the_pairs_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    file = written(directory / "pairs.jsonl", pair(1))
    directory.rename(tmp_path / "away")
    file.append([pair(2)])
    file.append([pair(3)])
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / "away").rename(directory)
    file.sync()
    assert [row["step"] for row in read_pairs(directory / "pairs.jsonl")] == [1, 2, 3]


def test_the_directory_is_made(tmp_path: Path) -> None:
    """At the start, not when the run ends; or the run does not start."""
    path = tmp_path / "not" / "yet" / "pairs.jsonl"
    written(path, pair(1))
    assert len(list(read_pairs(path))) == 1
    with pytest.raises(ConfigError, match=r"pairs_file='.*more' cannot be made \(File exists\); name a file"):
        PairFile(path / "more").restore(0)
    with pytest.raises(ConfigError, match=r"pairs_file='.*yet' cannot be made \(Is a directory\)"):
        PairFile(path.parent).restore(0)


def test_the_winner_is_chosen(tmp_path: Path) -> None:
    """Ties are counted, and left out."""
    written(tmp_path / "pairs.jsonl", pair(1), pair(2, label=-1), pair(3, label=0, margin=None))
    assert export([tmp_path / "pairs.jsonl"], tmp_path / "out.parquet") == (2, 1)
    first, second = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    assert (first["prompt"], first["chosen"], first["rejected"], first["margin"]) == ("p", "one", "two", 0.5)
    assert (second["chosen"], second["rejected"], second["margin"]) == ("two", "one", 0.5)

    assert (first["chosen_by"], first["chosen_tokens"], first["chosen_score"]) == ("policy", [1, 2], 1.0)
    assert (second["chosen_by"], second["chosen_score"], second["chosen_reference_logps"]) == ("reference", None, -2.0)
    assert first["run"] == tmp_path.name


def test_the_margin_is_that_of_the_chosen_one(tmp_path: Path) -> None:
    """With drawn labels (preference=sampled) the unlikelier one may have won."""
    written(tmp_path / "pairs.jsonl", pair(1, margin=-2.0), pair(2, label=-1, margin=2.0))
    export([tmp_path / "pairs.jsonl"], tmp_path / "out.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    assert rows["margin"][:] == [-2.0, -2.0]


def test_conversations_are_messages(tmp_path: Path) -> None:
    """A plain prompt beside them is a user's message; a begun answer is a part of the answer."""
    with_tools = [USER[0] | {"tool_calls": None}]
    written(tmp_path / "pairs.jsonl", pair(1, with_tools), pair(2, BEGUN), pair(3, "plain"))
    export([tmp_path / "pairs.jsonl"], tmp_path / "out.parquet")
    rows = list(load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train"))
    assert [row["prompt"] for row in rows] == [USER, USER, [{"role": "user", "content": "plain"}]]
    assert [row["chosen"][0] for row in rows] == [
        {"role": "assistant", "content": text} for text in ("one", "Asone", "one")
    ]


def test_runs_of_sweeps(tmp_path: Path) -> None:
    for name in ("sweep/0", "sweep/1", "alone"):
        (tmp_path / name).mkdir(parents=True)
        written(tmp_path / name / "pairs.jsonl", pair(1))
    files = pair_files([tmp_path / "sweep", tmp_path / "alone"])
    assert [path.parent.name for path in files] == ["0", "1", "alone"]
    assert export(files, tmp_path / "out.parquet") == (3, 0)
    # The jobs that it lists: one has run elsewhere, one has not begun; of its directory one is an older one.
    jobs = [{"run_dir": str(tmp_path / "alone")}, {"run_dir": "/moved/1"}, {"run_dir": str(tmp_path / "sweep" / "2")}]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert [path.parent.name for path in pair_files([tmp_path / "sweep"])] == ["alone", "1"]
    with pytest.raises(ConfigError, match=r"RUN_OR_SWEEP='.*' holds no pairs.jsonl; give outputs/DATE/TIME"):
        pair_files([tmp_path / "sweep" / ".." / "nothing"])


def test_a_judge_can_be_asked_about_them(tmp_path: Path) -> None:
    written(tmp_path / "pairs.jsonl", pair(1), pair(2, label=-1), pair(3, label=0, margin=None))
    pairs = load_pairs(str(tmp_path / "pairs.jsonl"))
    assert [(one.first, one.second, one.winner) for one in pairs] == [("one", "two", w) for w in (1.0, -1.0, 0.0)]


def test_nothing_to_export_is_an_empty_data_set(tmp_path: Path) -> None:
    written(tmp_path / "pairs.jsonl", pair(1, label=0))
    assert export([tmp_path / "pairs.jsonl"], tmp_path / "out.parquet") == (0, 1)
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["winner"] == "tie"
