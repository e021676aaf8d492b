"""MLflow follows a run directory: what its run lacks can be told at any time, and sent by any process, once."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpo.config.files import read_object, write_whole
from xpo.tracking.completions import TABLE_NAME
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_client import metric_name, stored_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

POINTS_AT_ONCE = 500  # in a request
# What of a run directory are artifacts, and in which folder.
ARTIFACTS = {
    "config.yaml": None,
    "pairs.parquet": None,
    "completions/step_*.json": "completions",
    f"completions/{TABLE_NAME}": None,
    "profile/*.json.gz": None,
}
# Tells the MLflow UI that the file is a table.
TABLE_TAG = "mlflow.loggedArtifacts"
TABLE_TAG_VALUE = json.dumps([{"path": TABLE_NAME, "type": "table"}])
# The Trainer's summary of a call of train(): about this process, not about the run.
_SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


@dataclass
class Followed:
    """RUN_DIR/mlflow.json: where the run is in MLflow, and what of it cannot be told from the other files."""

    uri: str
    run_id: str
    files: dict[str, list[int]] = field(default_factory=dict)  # what MLflow has: size and time of change by path
    tags: dict[str, str] = field(default_factory=dict)  # what MLflow has not taken yet, by name
    status: str | None = None  # how the run ended, as long as MLflow does not know
    ended: int | None = None  # when, in ms
    complete: bool = False  # the run has ended, and MLflow has all of it

    @classmethod
    def read(cls, run_dir: Path) -> "Followed":
        """What `run_dir` says; ConfigError if it is damaged."""
        return read_object(run_dir / "mlflow.json", cls)

    def write(self, run_dir: Path) -> None:
        """Puts it into `run_dir`, whole or not at all."""
        write_whole(run_dir / "mlflow.json", json.dumps(asdict(self), indent=1))


class Follower:
    """Sends what MLflow's run lacks of a run directory.

    Args:
        log: of the directory. What it holds already counts as logged, whatever a resumed run cuts afterwards.
        state: of an earlier process, or new.
        held: (key, step) of every point that MLflow holds. Another value at its step is not sent.
    """

    def __init__(self, log: MetricsLog, state: Followed, held: set[tuple[str, int]]):
        self.run_dir, self.log, self.state = log.path.parent, log, state
        self.points: list[tuple[str, float, int, int]] = []  # key, value, time, step: to be sent
        self.arrived = len(held & {point for entry in log.entries for point in _points_of(entry)})
        self._held = held
        self._offset = 0  # entries of the log that were looked at

    def read(self, again: bool = False) -> None:
        """Takes up what has been logged since; after a MetricsLog.restore `again` from the beginning."""
        if again:
            self._offset = 0
        for entry in self.log.entries[self._offset :]:
            for (key, step), value in _points_of(entry).items():
                if (key, step) not in self._held:
                    self._held.add((key, step))
                    self.points.append((key, value, entry["time"], step))
        self._offset = len(self.log.entries)

    def files(self) -> dict[str, str | None]:
        """The files that MLflow lacks, as they are now, and their folders.

        Files that lie here: a run directory of somebody else's may hold links to whatever this user can read.
        """
        found = [
            (path, folder)
            for pattern, folder in ARTIFACTS.items()
            for path in self.run_dir.glob(pattern)
            if path.is_file() and path.resolve().is_relative_to(self.run_dir.resolve())
        ]
        names = [(str(path.relative_to(self.run_dir)), folder) for path, folder in sorted(found)]
        return {name: folder for name, folder in names if self.state.files.get(name) != self._signature(name)}

    def _signature(self, name: str) -> list[int]:
        stat = (self.run_dir / name).stat()
        return [stat.st_size, stat.st_mtime_ns]

    def lacks(self) -> dict[str, int]:
        """How many points, files and tags MLflow lacks."""
        return {"point": len(self.points), "file": len(self.files()), "tag": len(self.state.tags)}

    @property
    def behind(self) -> bool:
        """Whether MLflow lacks anything."""
        return self.state.status is not None or any(self.lacks().values())

    def send(self, client: "MlflowClient", knock: Callable[[], object], seconds: float = math.inf) -> Exception | None:
        """Sends in order, for so long. The first failure ends it; but files may lie on another server than the rest.

        Args:
            client: of MLflow.
            knock: is called before each request, and raises if nobody answers.

        Returns:
            The first failure, of any type: drivers of databases and artifact stores raise their own.
        """
        from mlflow.entities import Metric

        until, state, failure = time.monotonic() + seconds, self.state, None

        def call(request: Callable[..., object], *arguments: Any, **options: Any) -> bool:
            nonlocal failure
            try:
                knock()
                request(state.run_id, *arguments, **options)
            except Exception as error:
                failure = failure or error
                return False
            return True

        while self.points:
            metrics = [Metric(*point) for point in self.points[:POINTS_AT_ONCE]]
            if not call(client.log_batch, metrics=metrics):
                return failure
            del self.points[:POINTS_AT_ONCE]
            if time.monotonic() > until:
                return None
        for key, value in list(state.tags.items()):
            if not call(client.set_tag, key, value):
                return failure
            del state.tags[key]
        for name, folder in self.files().items():
            signature = self._signature(name)
            if not call(client.log_artifact, str(self.run_dir / name), folder):
                continue
            state.files[name] = signature
            if name.endswith(TABLE_NAME) and not call(client.set_tag, TABLE_TAG, TABLE_TAG_VALUE):
                state.tags[TABLE_TAG] = TABLE_TAG_VALUE
            if time.monotonic() > until:
                return failure
        if state.status is not None and call(client.set_terminated, state.status, state.ended):
            state.status = None
        return failure

    def save(self) -> bool:
        """Brings mlflow.json up to date; whether that could be done."""
        self.state.complete = self.state.ended is not None and not self.behind
        try:
            self.state.write(self.run_dir)
        except OSError:
            return False
        return True


def _points_of(entry: dict[str, Any]) -> dict[tuple[str, int], float]:
    """The points of an entry of the log by key and step."""
    return {
        (stored_key(metric_name(name)), entry["step"]): float(value)
        for name, value in entry.items()
        if isinstance(value, Real) and name not in {"step", "time"} | _SUMMARY
    }


def in_words(counts: dict[str, int]) -> str:
    """Counts as text: "2 points, 1 file, 0 tags"."""
    return ", ".join(f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in counts.items())
