"""RUN_DIR/metrics.jsonl: whole lines, in order, as far as the checkpoint that a run goes on from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from xpo.config.errors import ConfigError
from xpo.tracking.metrics_log import MetricsLog, read_metrics

HISTORY = [{"loss": step / 8, "grad_norm": math.nan, "step": step} for step in (1, 2, 3)]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path)
    for entry in HISTORY:
        log.append(entry)
    return log


def test_a_line_is_a_log_and_its_time_and_is_there_at_once(log: MetricsLog, tmp_path: Path) -> None:
    written = lines(tmp_path)
    assert [sorted(line) for line in written] == [["grad_norm", "loss", "step", "time"]] * 3
    assert [line["loss"] for line in written] == [0.125, 0.25, 0.375]
    assert written[0]["time"] > 1.7e12
    log.append({"loss": np.float32(0.5), "count": np.int64(3), "step": 4})
    assert lines(tmp_path)[3].items() >= {"loss": 0.5, "count": 3.0, "step": 4}.items()


@pytest.mark.parametrize("known", [0, 2, 3])
def test_a_checkpoint_cuts_what_it_does_not_know(log: MetricsLog, tmp_path: Path, known: int) -> None:
    before = lines(tmp_path)
    again = MetricsLog(tmp_path)
    again.restore(HISTORY[:known])
    assert str(lines(tmp_path)) == str(before[:known])  # as they were, times too
    again.append({"loss": 9.0, "step": 9})
    assert [line["step"] for line in lines(tmp_path)] == [entry["step"] for entry in HISTORY[:known]] + [9]


def test_a_checkpoint_adds_what_the_file_lacks(log: MetricsLog, tmp_path: Path) -> None:
    """As of a run that was begun by an earlier version, or copied without the file."""
    (tmp_path / "metrics.jsonl").unlink()
    again = MetricsLog(tmp_path)
    again.restore(HISTORY)
    assert str(read_metrics(tmp_path)) == str(HISTORY)


def test_a_checkpoint_of_another_life_counts(log: MetricsLog, tmp_path: Path) -> None:
    """The run went back to step 1 and on from there, and was killed before it logged."""
    other = [HISTORY[0], {"loss": 7.0, "step": 2}]
    MetricsLog(tmp_path).restore(other)
    assert str(read_metrics(tmp_path)) == str(other)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_is_no_line(log: MetricsLog, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = MetricsLog(tmp_path)
    assert [entry["step"] for entry in again.entries] == [1, 2]
    again.append({"loss": 0.5, "step": 3})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_another_line_that_is_no_json_is_one_line(log: MetricsLog, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"loss": 0.25', "{"))
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2 is no JSON; mend the line or delete it"):
        MetricsLog(tmp_path)


def test_what_cannot_be_written_waits_in_memory(
    log: MetricsLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = tmp_path.with_name("hidden")
    tmp_path.rename(hidden)
    for step in (4, 5):
        log.append({"step": step})
    assert [entry["step"] for entry in log.unsaved] == [4, 5]
    assert len(caplog.records) == 1
    hidden.rename(tmp_path)
    log.sync()
    assert log.unsaved == []
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_runs_before_this_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps([{"loss": 1.0, "step": 1}]))
    assert read_metrics(tmp_path) == [{"loss": 1.0, "step": 1}]


def test_the_history_is_the_trainers(log: MetricsLog, tmp_path: Path) -> None:
    log.append({"final/win_rate": 0.5, "step": 3})
    assert str(read_metrics(tmp_path)) == str(HISTORY)
