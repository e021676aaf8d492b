"""What a run logs and MLflow has not taken yet: in order, in a file that outlives the process. Layer 0: no torch."""

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpo.config.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

POINTS_AT_ONCE = 500  # in a request, and in a line of the file

Entry = dict[str, Any]


class Backlog:
    """What MLflow has not taken yet, in order, in a file that outlives the process.

    A line of it is JSON: where the rest belongs, {"uri", "experiment", "run_id"}, of which the last one counts, or
    {"metrics": [[key, value, time in ms, step], ...]}, {"file": path, "folder": name or null}, {"tag": [key, value]},
    {"status": name, "time": ms}. The file only grows, until all of it was sent; then it is removed. All of it can be
    sent again: a point with its time is stored once, and of files, tags and status the last one counts.

    Args:
        path: the file; what it holds already is read. None keeps everything in memory.

    Raises:
        ConfigError: a line of the file is no JSON.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.where: dict[str, str] = {}
        self.entries: list[Entry] = []
        self._unsaved: list[Entry] = []
        self._size = 0  # bytes of whole lines
        self._warned = False
        if path is not None and path.exists():
            text = path.read_bytes()
            self._size = text.rfind(b"\n") + 1  # a kill may have torn the last line
            for number, line in enumerate(text[: self._size].splitlines(), 1):
                try:
                    entry = json.loads(line)
                except ValueError:
                    raise ConfigError(f"{path}, line {number} is no JSON; mend the line or delete it") from None
                if "run_id" in entry:
                    self.where = entry
                else:
                    self._queue(entry)

    @property
    def directory(self) -> Path:
        """What the paths of files are relative to."""
        return self.path.parent if self.path is not None else Path()

    @property
    def saved(self) -> bool:
        """Whether anything is in the file."""
        return self._size > 0

    @property
    def unsaved(self) -> list[Entry]:
        """What is in memory only."""
        return [entry for entry in self._unsaved if "run_id" not in entry]

    def belongs(self, where: dict[str, str]) -> None:
        """Says whose entries these are: uri, experiment and run_id."""
        if where != self.where:
            self.where = where
            self._unsaved.append(where)

    def append(self, entry: Entry) -> None:
        """Queues an entry, in memory for now."""
        self._queue(entry)
        self._unsaved.append(entry)

    def _queue(self, entry: Entry) -> None:
        last = self.entries[-1].get("metrics") if self.entries else None
        if "metrics" not in entry:
            self.entries = [other for other in self.entries if other != entry] + [entry]  # a file's newest content
        elif last is not None and len(last) + len(entry["metrics"]) <= POINTS_AT_ONCE:
            self.entries[-1] = {"metrics": last + entry["metrics"]}
        else:
            self.entries.append(entry)

    def forget(self, held: set[tuple[str, int]]) -> int:
        """Drops points that MLflow holds at their step, and adds the others to `held`. Returns how many it dropped."""
        kept, dropped = [], 0
        for entry in self.entries:
            if "metrics" in entry:
                new = [point for point in entry["metrics"] if (point[0], point[3]) not in held]
                dropped += len(entry["metrics"]) - len(new)
                held |= {(point[0], point[3]) for point in new}
                entry = {"metrics": new}
            if entry != {"metrics": []}:
                kept.append(entry)
        self.entries = kept
        return dropped

    def save(self) -> None:
        """Brings the file up to date, line by line. While that cannot be done, memory keeps the rest: one warning."""
        if self.path is None or not self.entries:
            return
        try:
            with self.path.open("ab") as file:
                file.truncate(self._size)  # what a kill or a full disk has torn
                while self._unsaved:
                    line = json.dumps(self._unsaved[0]).encode() + b"\n"
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                    self._size += len(line)
                    del self._unsaved[0]
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "xpo: %s cannot be written (%s); what it lacks waits in memory", self.path, error.strerror
                )
            self._warned = True

    def drain(self, send: Callable[[Entry], object], seconds: float = math.inf) -> Exception | None:
        """Sends entries in order, for so long, and removes the file when that was all.

        The first failure ends it. Only files are passed over after one, as their store may be another server.

        Returns:
            The first failure, of any type: drivers of databases and artifact stores raise their own.
        """
        until = time.monotonic() + seconds
        waiting, failure = 0, None  # files that are passed over come first
        while waiting < len(self.entries):
            entry = self.entries[waiting]
            if failure is not None and "file" in entry:
                waiting += 1
                continue
            try:
                send(entry)
            except Exception as error:
                failure = failure or error
                if "file" not in entry:
                    break
                waiting += 1
                continue
            del self.entries[waiting]
            if time.monotonic() > until:
                break
        if not self.entries:
            self._unsaved, self._size = [self.where], 0
            if self.path is not None:
                self.path.unlink(missing_ok=True)
        return failure


def send(client: "MlflowClient", run_id: str, entry: Entry, directory: Path) -> bool:
    """Sends one entry of a backlog in `directory`. Returns False, with a warning, for a file that no longer exists."""
    from mlflow.entities import Metric

    match entry:
        case {"metrics": points}:
            client.log_batch(run_id, metrics=[Metric(*point) for point in points])
        case {"tag": [key, value]}:
            client.set_tag(run_id, key, value)
        case {"status": status, "time": ended}:
            client.set_terminated(run_id, status, ended)
        case {"file": path, "folder": folder}:
            if not (directory / path).is_file():
                logger.warning("xpo: %s is gone: MLflow will not have it", directory / path)
                return False
            client.log_artifact(run_id, str(directory / path), folder)
    return True


def count(entries: Iterable[Entry]) -> Counter[str]:
    """How many points, files and tags there are."""
    counts = Counter({"point": 0, "file": 0, "tag": 0})
    for entry in entries:
        counts["point"] += len(entry.get("metrics", ()))
        counts["file"] += "file" in entry
        counts["tag"] += "tag" in entry
    return counts


def in_words(counts: Counter[str]) -> str:
    """Counts as text: "2 points, 1 file, 0 tags"."""
    return ", ".join(f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in counts.items())
