"""RUN_DIR/metrics.jsonl: everything that a run logs, one JSON line per log, tracked or not."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from xpo.config.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"
_SHOWN = (
    *("win_rate", "tie_rate", "lose_rate", "score", "kl", "eos_rate", "length", "distinct_2"),
    *("exploration/unique", "exploration/novel_ngrams"),
)


class MetricsLog:
    """An entry is a log of the Trainer with its step, and "time": when it was logged, in ms since 1970.

    A line reaches the system at once and the disk with `sync`. What a full disk refuses waits in memory.

    Args:
        run_dir: the run directory. What its file holds already is read; a torn last line, of a kill, is not.

    Raises:
        ConfigError: another line of the file is no JSON.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / NAME
        self.entries: list[dict[str, Any]] = []
        self._ends = [0]  # of the lines in the file, in bytes
        self._warned = False
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True), 1):
            try:
                self.entries.append(dict(json.loads(line).items()))
            except (ValueError, AttributeError):
                raise ConfigError(f"{self.path}, line {number} is no JSON; mend the line or delete it") from None
            self._ends.append(self._ends[-1] + len(line))

    @property
    def unsaved(self) -> list[dict[str, Any]]:
        """What is in memory only."""
        return self.entries[len(self._ends) - 1 :]

    def append(self, log: dict[str, Any]) -> None:
        """Adds a log, which has its step; numbers may be NumPy's."""
        entry = json.loads(json.dumps(log | {"time": int(time.time() * 1000)}, default=float))
        self.entries.append(entry)
        self._write()

    def restore(self, history: list[dict[str, Any]]) -> None:
        """Goes back to a checkpoint, which knows `history`: cuts what was logged after it, adds what is missing."""
        kept = 0
        for entry, log in zip(self.entries, history, strict=False):
            if _text(entry) != _text(log):
                break
            kept += 1
        del self.entries[kept:], self._ends[kept + 1 :]
        for log in history[kept:]:
            self.append(log)
        self.sync()

    def sync(self) -> None:
        """Brings the file to the disk, whole lines only."""
        self._write(durable=True)

    def _write(self, durable: bool = False) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(self._ends[-1])  # what a kill or a full disk has torn, what a checkpoint did not know
                for entry in self.unsaved:
                    line = json.dumps(entry).encode() + b"\n"
                    file.write(line)
                    file.flush()
                    self._ends.append(self._ends[-1] + len(line))
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                reason = error.strerror
                logger.warning("xpo: %s cannot be written (%s); what it lacks waits in memory", self.path, reason)
            self._warned = True


def _text(log: dict[str, Any]) -> str:
    """A log without its time: as text, in which NaN is NaN."""
    return json.dumps({name: value for name, value in log.items() if name != "time"}, default=float, sort_keys=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The Trainer's log history of a run, [] without one; runs before metrics.jsonl have it in their metrics.json."""
    former = run_dir / "metrics.json"
    if former.is_file() and not (run_dir / NAME).is_file():
        return json.loads(former.read_text())
    logs = [entry for entry in MetricsLog(run_dir).entries if not any(name.startswith("final/") for name in entry)]
    return [{name: value for name, value in log.items() if name != "time"} for log in logs]


def evaluations(history: list[dict[str, Any]], prefix: str = "eval") -> list[dict[str, float]]:
    """The evaluations in a Trainer's log history, in order, with their step."""
    return [entry for entry in history if f"{prefix}_runtime" in entry]


def measures(evaluation: dict[str, float], prefix: str = "eval") -> list[str]:
    """The metrics of an evaluation that a person wants to see first, then the scorers'."""
    names = [name.removeprefix(f"{prefix}_") for name in evaluation if name.startswith(f"{prefix}_")]
    scorers = [name.removeprefix("ref_") for name in names if name.startswith("ref_")]
    return [name for name in dict.fromkeys((*_SHOWN, *scorers)) if name in names]
