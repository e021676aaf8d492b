"""MLflow: one run per training run, whose points are neither lost nor logged twice."""

import contextlib
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xpo.errors import ConfigError

logger = logging.getLogger(__name__)

_MAX_PARAM = 6000  # characters of a value that MLflow keeps
_MAX_KEY = 250  # characters of the name of a param or metric
_FLUSH_POINTS, _FLUSH_SECONDS = 500, 2.0
_RETRY_AFTER_S = (0.0, 1.0, 3.0)
_LAST_RETRY_AFTER_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # at the end of a run: what is not sent by then is lost
_UNAVAILABLE = (MlflowException, SQLAlchemyError, OSError)


def _knock(uri: str) -> None:
    """OSError within seconds if no server listens, where MLflow's client would retry for minutes."""
    with contextlib.suppress(urllib.error.HTTPError):  # a refusal is an answer: MLflow's client can log in
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3).close()


def tracking_uri(uri: str | None) -> str:
    """The tracking server or database: `uri`, $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the working directory."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


class MLflowRun:
    """A run in MLflow. Points are buffered and sent together; a resumed run knows what it holds.

    Args:
        uri: tracking server or database; None for a database in the working directory.
        experiment: name of the experiment; made at first use.
        run_name: what the UI calls the run.
        params: configuration values by dotted key. Those that the run already has stay as they are.
        tags: texts by name.
        run_id: the run to go on with; None starts a new one.

    Raises:
        ConfigError: the tracking server or database does not answer.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        run_id: str | None = None,
    ):
        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.uri = tracking_uri(uri)
        self._logged: set[tuple[str, int]] = set()
        self._points: list[Metric] = []
        try:
            self.client, self.experiment_id = self._connect(experiment)
            self.run_id = run_id if run_id and self._exists(run_id) else self._create(run_name)
            self._describe(params, tags)
        except (*_UNAVAILABLE, ImportError) as error:  # ImportError: the database's driver
            raise ConfigError(
                f"tracking.uri={self.uri!r} does not answer ({_first_line(error)}); correct it, or set tracking=none"
            ) from error
        self._flushed_at = time.monotonic()

    def _connect(self, experiment: str) -> tuple[MlflowClient, str]:
        """A client, and the experiment's id. Concurrent first starts on an empty database must not race."""
        if self.uri.startswith(("http://", "https://")):
            _knock(self.uri)
        if not self.uri.startswith("sqlite:///"):
            client = MlflowClient(self.uri)
            return client, self._experiment(client, experiment, None)
        database = Path(self.uri.removeprefix("sqlite:///")).absolute()
        database.parent.mkdir(parents=True, exist_ok=True)
        artifacts = database.parent / "mlruns" / experiment
        with FileLock(f"{database}.lock"):  # the client itself makes the tables
            client = MlflowClient(self.uri)
            return client, self._experiment(client, experiment, artifacts.as_uri())

    @staticmethod
    def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        return found.experiment_id

    def _describe(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Logs params and tags, and reads which points the run holds."""
        run = self.client.get_run(self.run_id)
        texts = {_key(key): str(value)[:_MAX_PARAM] for key, value in params.items() if value is not None}
        new = [Param(key, text) for key, text in texts.items() if key not in run.data.params]
        self.client.log_batch(self.run_id, params=new, tags=[RunTag(key, value) for key, value in tags.items()])
        self.client.update_run(self.run_id, status="RUNNING")
        for key in run.data.metrics:
            self._logged |= {(key, point.step) for point in self.client.get_metric_history(self.run_id, key)}

    def _exists(self, run_id: str) -> bool:
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException:
            return False

    def _create(self, run_name: str) -> str:
        return self.client.create_run(self.experiment_id, run_name=run_name).info.run_id

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Adds points to the buffer, except those that the run already has at this step."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            key = _key(name)
            if (key, step) not in self._logged:
                self._logged.add((key, step))
                self._points.append(Metric(key, float(value), now, step))
        if len(self._points) >= _FLUSH_POINTS or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Sends the buffer. What cannot be sent stays in it, with a warning, for the next time.

        Args:
            last: there is no next time: try for longer.
        """
        waits = _LAST_RETRY_AFTER_S if last else _RETRY_AFTER_S
        while self._points:
            chunk = self._points[:_FLUSH_POINTS]
            if not self._retried(lambda chunk=chunk: self.client.log_batch(self.run_id, metrics=chunk), waits):  # type: ignore[misc]
                logger.warning("MLflow did not take %d points%s", len(self._points), "" if last else " yet")
                break
            del self._points[: len(chunk)]
        self._flushed_at = time.monotonic()

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Stores a file among the run's artifacts."""
        self._retried(lambda: self.client.log_artifact(self.run_id, str(path), folder), _RETRY_AFTER_S)

    def set_tag(self, key: str, value: str) -> None:
        """Sets one tag."""
        self._retried(lambda: self.client.set_tag(self.run_id, key, value), _RETRY_AFTER_S)

    def finish(self, status: str = "FINISHED") -> None:
        """Sends what is left and ends the run as FINISHED, FAILED or KILLED."""
        self.flush(last=True)
        self._retried(lambda: self.client.set_terminated(self.run_id, status), _RETRY_AFTER_S)

    def ui_command(self) -> str:
        """What opens the UI on this run's experiment."""
        if self.uri.startswith("http"):
            return f"{self.uri}/#/experiments/{self.experiment_id}/runs?compareRunsMode=CHART"
        return f"mlflow ui --backend-store-uri {self.uri}"

    @staticmethod
    def _retried(call: Callable[[], Any], waits: Sequence[float]) -> bool:
        for wait in waits:
            time.sleep(wait)
            try:
                call()
                return True
            except _UNAVAILABLE as error:
                reason = _first_line(error)
        logger.warning("MLflow: %s", reason)
        return False


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _key(name: str) -> str:
    """`name` as MLflow takes it for a param or metric."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_KEY]


def metric_name(name: str) -> str:
    """MLflow's name of a Trainer log: "eval_win_rate" is eval/win_rate; the UI groups by the prefix."""
    return name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name


# The Trainer's summary of a call of train(): about this process, not about the run.
_SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


class MLflowCallback(TrainerCallback):
    """Sends every logged metric to a run. On a resumed run, first what its checkpoint knows of."""

    def __init__(self, run: MLflowRun):
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            for entry in state.log_history:
                self._log(entry, entry["step"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._log(logs or {}, state.global_step)

    def _log(self, logs: dict[str, Any], step: int) -> None:
        metrics = {  # Real: NumPy's numbers too
            metric_name(name): float(value)
            for name, value in logs.items()
            if isinstance(value, Real) and name != "step" and name not in _SUMMARY
        }
        self.run.log_metrics(metrics, step)


COMPLETION_COLUMNS = ("prompt", "completion", "reference", "verdict", "score", "ref_score", "step")


def completion_rows(records: Iterable[dict[str, Any]], step: int) -> list[list[Any]]:
    """Evaluation records as rows of COMPLETION_COLUMNS; scores that are no number are empty."""
    verdicts = {1.0: "policy", -1.0: "reference", 0.0: "none"}

    def score(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None  # JSON knows no NaN

    return [
        [
            record["prompt"],
            record["completion"],
            record["reference"],
            verdicts[record["label"]],
            score(record.get("score")),
            score(record.get("ref_score")),
            step,
        ]
        for record in records
    ]


def write_table(path: Path, rows: list[list[Any]]) -> None:
    """Writes rows in the format that the MLflow UI compares side by side, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"columns": COMPLETION_COLUMNS, "data": rows}, indent=1))
    unfinished.replace(path)


# Tells the MLflow UI that the file is a table.
TABLE_TAG = "mlflow.loggedArtifacts"
TABLE_NAME = "eval_completions.json"
TABLE_TAG_VALUE = json.dumps([{"path": TABLE_NAME, "type": "table"}])
