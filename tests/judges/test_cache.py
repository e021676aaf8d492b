"""The verdict cache: each verdict is computed once, whatever happens to the process; and its store."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.data.store import Store
from xpo.judges import CachedJudge, FunctionJudge, Judge, PairwiseJudge
from xpo.launch.groups import build_preference
from xpo.rewards import CachedReward, FunctionReward, RewardModel


class Counting(PairwiseJudge):
    """Prefers the longer text; remembers what it was asked. The text "broken" fails."""

    def __init__(self, name: str | None = "counting") -> None:
        super().__init__()
        self.name = name
        self.asked: list[tuple[Prompt, str, str]] = []

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]):  # type: ignore[no-untyped-def]
        self.asked += zip(prompts, first, second, strict=True)
        return super().verdicts(prompts, first, second)

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        rows = zip(first, second, strict=True)
        return torch.tensor([float("nan") if "broken" in (a, b) else float(len(a) - len(b)) for a, b in rows])

    @property
    def fingerprint(self) -> str | None:
        return self.name


PROMPTS: list[Prompt] = ["one", "two", [{"role": "user", "content": "three"}]]
FIRST = ["aaa", "b", "cc"]
SECOND = ["a", "bbb", "c"]


def test_a_pair_is_judged_once(tmp_path: Path) -> None:
    judge = Counting()
    fresh = CachedJudge(judge, tmp_path / "verdicts.sqlite").verdicts(PROMPTS, FIRST, SECOND)
    torch.testing.assert_close(fresh.margin, torch.tensor([2.0, -2.0, 1.0]))
    again = CachedJudge(judge, tmp_path / "verdicts.sqlite")  # another process, say
    kept = again.verdicts(PROMPTS, FIRST, SECOND)
    assert torch.equal(kept.margin, fresh.margin)
    assert torch.equal(kept.flipped, fresh.flipped)
    assert torch.equal(again.margins(PROMPTS, SECOND, FIRST), -fresh.margin)  # the other order is the same pair
    assert len(judge.asked) == 3


@pytest.mark.parametrize("value", [b"12345", b"", "text"])
def test_a_damaged_verdict_is_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: bytes | str
) -> None:
    """And kept, as if it had never been there."""
    judge, path = Counting(), tmp_path / "verdicts.sqlite"
    fresh = CachedJudge(judge, path).verdicts(PROMPTS, FIRST, SECOND)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE results SET value = ? WHERE key = (SELECT min(key) FROM results)", [value])
    for _ in range(2):
        again = CachedJudge(judge, path).verdicts(PROMPTS, FIRST, SECOND)
        assert torch.equal(again.margin, fresh.margin)
    assert len(judge.asked) == len(PROMPTS) + 1
    assert caplog.messages == [f"xpo: {path} holds 1 damaged results, computed again"]


def test_equal_pairs_of_a_batch_are_asked_once(tmp_path: Path) -> None:
    judge = Counting()
    margins = CachedJudge(judge, tmp_path / "v").margins(["p"] * 4, ["aa", "b", "aa", "c"], ["b", "aa", "b", "c"])
    assert margins.tolist() == [1, -1, 1, 0]
    assert len(judge.asked) == 2


def test_failed_verdicts_are_asked_again(tmp_path: Path) -> None:
    judge = Counting()
    cached = CachedJudge(judge, tmp_path / "v")
    for _ in range(2):
        margins = cached.margins(["p", "p"], ["broken", "aa"], ["b", "b"])
        assert margins.isnan().tolist() == [True, False]
    assert judge.asked == [("p", "b", "broken"), ("p", "aa", "b"), ("p", "b", "broken")]


def test_judges_prompts_and_texts_do_not_mix(tmp_path: Path) -> None:
    CachedJudge(Counting("one"), tmp_path / "v").margins(["p"], ["aa"], ["b"])
    for name, prompt, text in [("two", "p", "aa"), ("one", "q", "aa"), ("one", "p", "ab")]:
        judge = Counting(name)
        CachedJudge(judge, tmp_path / "v").margins([prompt], [text], ["b"])
        assert len(judge.asked) == 1


def test_what_was_asked_is_committed_part_by_part(tmp_path: Path) -> None:
    class Dies(Counting):
        def verdicts(self, prompts, first, second):  # type: ignore[no-untyped-def]
            if len(self.asked) >= 4:
                raise KeyboardInterrupt
            return super().verdicts(prompts, first, second)

    with pytest.raises(KeyboardInterrupt):
        CachedJudge(Dies(), tmp_path / "v", commit_every=2).margins(list("012345"), ["aa"] * 6, ["b"] * 6)
    judge = Counting()
    CachedJudge(judge, tmp_path / "v").margins(list("012345"), ["aa"] * 6, ["b"] * 6)
    assert [prompt for prompt, _, _ in judge.asked] == ["4", "5"]


def test_a_judge_without_fingerprint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"FunctionJudge has none.*judge.cache=off"):
        CachedJudge(FunctionJudge(lambda *_: []), tmp_path / "v")
    with pytest.raises(ConfigError, match=r"FunctionReward has none.*judge.cache=off"):
        CachedReward(FunctionReward(lambda *_: []), tmp_path / "v")


def test_an_empty_batch(tmp_path: Path) -> None:
    assert CachedJudge(Counting(), tmp_path / "v").margins([], [], []).shape == (0,)


def test_scores_are_computed_once(tmp_path: Path) -> None:
    scored: list[str] = []

    class Length(RewardModel):
        def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
            scored.extend(completions)
            return torch.tensor([float("nan") if text == "broken" else len(text) / 3 for text in completions])

        @property
        def fingerprint(self) -> str:
            return "length"

    for _ in range(2):
        scores = CachedReward(Length(), tmp_path / "s").scores(["p"] * 4, ["a", "bb", "broken", "a"])
        torch.testing.assert_close(scores, torch.tensor([1 / 3, 2 / 3, float("nan"), 1 / 3]), equal_nan=True)
    assert scored == ["a", "bb", "broken", "broken"]


def test_scores_may_be_a_list(tmp_path: Path) -> None:
    class Listing(RewardModel):
        fingerprint = "listing"

        def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
            return [len(text) for text in completions]

    assert CachedReward(Listing(), tmp_path / "s").scores(["p"] * 2, ["a", "bb"]).tolist() == [1, 2]


def test_a_part_that_can_be_kept_is_enough(tmp_path: Path) -> None:
    """Of a mix whose other part is a function, which has no fingerprint."""
    parts = {
        "words": {"_target_": "xpo.rewards.VaderReward"},
        "mine": {"_target_": "xpo.rewards.FunctionReward", "function": "builtins:max"},
    }
    mix = {"_target_": "xpo.rewards.MixReward", "models": parts, "weights": {"words": 1.0, "mine": 1.0}}
    judge = {"_target_": "xpo.judges.RewardJudge", "cache": str(tmp_path / "v")}
    scorer, _ = build_preference(judge, mix)
    assert type(scorer.models["words"]) is CachedReward
    with pytest.raises(ConfigError, match="has nothing to keep"):
        build_preference(judge, parts["mine"])


def test_state_is_the_judges(tmp_path: Path) -> None:
    class Stateful(Counting):
        count = 5

        def state(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    judge = Stateful()
    cached: Judge = CachedJudge(judge, tmp_path / "v")
    assert cached.state() == {"count": 5}
    cached.load_state({"count": 7})
    assert judge.count == 7


# ---- the store -----------------------------------------------------------------------------------


def test_a_value_stays_what_it_was_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "store.sqlite")
    store.put({"a": b"1", "b": b"2"})
    store.put({"a": b"3"})
    assert store.get(["a", "b", "c", "a"]) == {"a": b"1", "b": b"2"}
    assert len(store) == 2


def test_more_keys_than_a_statement_takes(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    values = {str(i): str(i).encode() for i in range(2000)}
    store.put(values)
    assert store.get(values) == values


@pytest.mark.parametrize("damage", [b"", b"no database at all " * 100, None])
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None) -> None:
    path = tmp_path / "store.sqlite"
    store = Store(path)
    store.put({str(i): b"x" * 500 for i in range(200)})
    store.close()
    if damage is None:  # the first page is sound, others are not
        content = bytearray(path.read_bytes())
        content[4096:] = os.urandom(len(content) - 4096)
        path.write_bytes(content)
    else:
        path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        store = Store(path)
        store.get(str(i) for i in range(200))
        store.put({"new": b"value"})
    assert Store(path).get(["new"]) == {"new": b"value"}
    aside = [file for file in tmp_path.iterdir() if ".damaged-" in file.name]
    if damage == b"":  # an empty file is an empty database
        assert not aside
        assert not caplog.messages
    else:
        assert aside
        assert any("is damaged" in message for message in caplog.messages)


def test_a_full_disk_costs_what_it_does_not_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run has its results in memory; a real limit of pages stands for the disk."""
    store = Store(tmp_path / "store.sqlite")
    store.put({"a": b"1"})
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count={pages}")
    with caplog.at_level(logging.WARNING):
        for name in ("b", "c"):
            store.put({name: b"x" * 100_000})
    assert store.get(["a", "b", "c"]) == {"a": b"1"}
    assert [message for message in caplog.messages if "takes no new results" in message] == [
        f"xpo: {tmp_path / 'store.sqlite'} takes no new results (database or disk is full); the run goes on without it"
    ]
    assert len(list(tmp_path.glob("*damaged*"))) == 0


def test_a_lock_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound file must not be set aside while somebody else looks after a damaged page."""
    store = Store(tmp_path / "store.sqlite")
    store.put({"a": b"1"})

    def locked(self: Store) -> sqlite3.Connection:
        raise sqlite3.OperationalError("database is locked")

    def damaged() -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(Store, "_connect", locked)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store._mended(damaged)
    assert len(list(tmp_path.glob("*damaged*"))) == 0


WRITER = """
import os, sys, time
import torch
from xpo.judges import CachedJudge, Judge

class Slow(Judge):
    def margins(self, prompts, first, second):
        with open(sys.argv[2], "a") as log:
            log.writelines(f"{prompt}\\n" for prompt in prompts)
        time.sleep(0.02)
        return torch.tensor([float(len(a) - len(b)) for a, b in zip(first, second)])

    @property
    def fingerprint(self):
        return "slow"

numbers = range(int(sys.argv[3]), int(sys.argv[4]))
judge = CachedJudge(Slow(), sys.argv[1], commit_every=5)
margins = judge.margins([str(i) for i in numbers], ["a" * (i % 7) for i in numbers], ["bbb"] * len(numbers))
assert margins.tolist() == [float(i % 7 - 3) for i in numbers]
"""


def writer(path: Path, log: Path, start: int, stop: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, *map(str, (path, log, start, stop))])


def test_two_processes_and_kill_9_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    """Two runs share a file and are killed in the middle; nothing they had committed is computed again."""
    path = tmp_path / "verdicts.sqlite"
    runs = [writer(path, tmp_path / f"log{i}", 100 * i, 100 * i + 1000) for i in (0, 5)]
    deadline = time.monotonic() + 60
    while not (path.exists() and all(log.exists() for log in (tmp_path / "log0", tmp_path / "log5"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while len(Store(path)) < 100:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for run in runs:
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    committed = len(Store(path))
    assert 0 < committed < 1500
    again = [writer(path, tmp_path / f"again{i}", 100 * i, 100 * i + 1000) for i in (0, 5)]
    assert [run.wait() for run in again] == [0, 0]
    # Of one whose pairs the other has judged meanwhile there is no file.
    asked = {number for log in tmp_path.glob("again*") for number in log.read_text().split()}
    assert len(Store(path)) == 1500
    assert len(asked) == 1500 - committed
