"""A run in MLflow. What it logs is neither lost nor logged twice, also when MLflow is out of reach."""

import logging
import math
import re
import shlex
import time
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from xpo.config.errors import ConfigError, first_line
from xpo.tracking import mlflow_client
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_follower import POINTS_AT_ONCE, Followed, Follower, in_words
from xpo.tracking.mlflow_ui import chart_link

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_MAX_NAME = 250  # characters of a run's name that PostgreSQL and MySQL keep
_MAX_PARAM = 6000  # characters of a value that MLflow keeps
_MAX_REASON = 1000  # characters of what MLflow says; the remedy comes last
_FLUSH_SECONDS = 2.0
_KNOCK_S = 3.0  # how long a server or a lock may keep a training step waiting
_DRAIN_S = 3.0  # how long a training step sends what has piled up
_RETRY_S, _MAX_RETRY_S = 5.0, 60.0  # between attempts in training
_LAST_RETRY_AFTER_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # at the end of a run


class MLflowRun:
    """A run in MLflow, which follows a run directory: its metrics.jsonl, completions and profiles, how it ended.

    When MLflow is out of reach, training goes on. What it lacks is sent as soon as it is back, by this process, by a
    resumed one, or by `python -m xpo.track replay`.

    Args:
        uri: tracking server or database; None for a database in the working directory.
        experiment: name of the experiment; made at first use.
        run_name: what the UI calls the run.
        params: configuration values by dotted key. Those that the run already has stay as they are.
        tags: texts by name.
        log: the metrics of the run directory.
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
        log: MetricsLog,
        run_id: str | None = None,
    ):
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri = mlflow_client.tracking_uri(uri)
        self.log = log
        self._run_dir = log.path.parent
        self._sweep = tags.get("xpo.sweep")
        self._wait = _RETRY_S
        self._retry_at = -math.inf
        self._reachable = True
        try:
            self.client, self.experiment_id = self._connect(experiment)
            is_new = run_id is None or not self._exists(run_id)
            if run_id is None or is_new:
                run_id = self.client.create_run(self.experiment_id, run_name=run_name[:_MAX_NAME]).info.run_id
            self.run_id = run_id
            run = self.client.get_run(run_id)
            held = mlflow_client.held_points(self.client, run)
            self._follower = Follower(log, self._taken_up(), held)
            self._describe(run, params, tags)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:  # ImportError: the database's driver
            raise ConfigError(
                f"tracking.uri={self.uri!r} does not answer ({first_line(error)[:_MAX_REASON]}); "
                "correct it, or set tracking=none"
            ) from error
        self._saved, self._flushed_at, self._ended = True, -math.inf, False
        if not (is_new and log.entries):  # what of another run's log is this one's, training knows when it begins
            self.flush()

    def _connect(self, experiment: str) -> tuple["MlflowClient", str]:
        """A client, and the experiment's id. Concurrent first starts on an empty database must not race."""
        if not self.uri.startswith("sqlite:///"):
            client = mlflow_client.reach(self.uri)
            return client, self._experiment(client, experiment, None)
        file = mlflow_client.database(self.uri)
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name such as "/Shared/x" is no path.
        artifacts = file.parent / "mlruns" / re.sub(r"[^\w .-]", "_", experiment).strip(".")[:100]
        with FileLock(f"{file}.lock"):  # the client itself makes the tables
            client = mlflow_client.make_client(self.uri)
            return client, self._experiment(client, experiment, artifacts.as_uri())

    @staticmethod
    def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise ConfigError(
                f"tracking.experiment={name!r} was deleted in MLflow; restore it ({restore}) or give another"
            )
        return found.experiment_id

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # trouble of the moment must not begin a second run
                raise
            return False

    def _taken_up(self) -> Followed:
        """What an earlier process left. If its run is gone from MLflow, this one has it all."""
        state = Followed(self.uri, self.run_id)
        if (self._run_dir / "mlflow.json").exists():
            before = Followed.read(self._run_dir)
            state.tags = before.tags
            state.files = before.files if (before.uri, before.run_id) == (self.uri, self.run_id) else {}
        state.write(self._run_dir)
        return state

    def _describe(self, run: "Run", params: dict[str, Any], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.tracking.context.registry import resolve_tags

        tags = resolve_tags() | tags  # who runs it, and the commit of this code
        given = {mlflow_client.stored_key(key): value for key, value in params.items() if value is not None}
        new = [Param(key, str(value)[:_MAX_PARAM]) for key, value in given.items() if key not in run.data.params]
        self.client.log_batch(self.run_id, params=new, tags=[RunTag(key, value) for key, value in tags.items()])
        self.client.update_run(self.run_id, status="RUNNING")

    def follow(self, again: bool = False) -> None:
        """Takes up what was logged since, `again` from the beginning, and sends what is old or much, for seconds."""
        self._follower.read(again)
        if len(self._follower.points) >= POINTS_AT_ONCE or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends what is there, unless MLflow was out of reach a moment ago."""
        self._follower.read()
        if time.monotonic() >= self._retry_at:
            self._drain(_DRAIN_S)
        self._flushed_at = time.monotonic()

    def set_tag(self, key: str, value: str) -> None:
        """Sets one tag."""
        self._follower.state.tags[key] = value
        self._saved = self._follower.save()
        self.flush()

    def finish(self, status: str = "FINISHED") -> None:
        """Sends what is left, trying for a minute or so, and ends the run as FINISHED, FAILED or KILLED: once."""
        follower = self._follower
        if self._ended:  # what comes after the end, a push to the hub say, changes nothing about it
            return
        self._ended = True
        follower.read()
        follower.state.status, follower.state.ended = status, int(time.time() * 1000)
        self._drain()
        for wait in _LAST_RETRY_AFTER_S:
            if not follower.behind:
                return
            time.sleep(wait)
            self._drain()
        left = in_words(follower.lacks())
        if follower.log.unsaved or not self._saved:
            logger.warning("xpo: the end of this run is lost (%s): neither MLflow nor a file has taken it", left)
        else:
            there = mlflow_client.naming("--uri", self.uri)
            command = shlex.join(["python", "-m", "xpo.track", "replay", str(self._run_dir), *there])
            logger.warning("xpo: MLflow lacks the end of this run (%s); send it with: %s", left, command)

    def ui_command(self) -> str:
        """What opens the UI: a server's charts of this run's sweep or experiment, or the command that starts one."""
        if mlflow_client.is_server(self.uri):
            return chart_link(self.uri, self.experiment_id, self._sweep)
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def _drain(self, seconds: float = math.inf) -> None:
        """Sends what MLflow lacks; after a failure the next attempt is a while away."""
        with mlflow_client.short_calls():
            failure = self._follower.send(self.client, lambda: mlflow_client.knock(self.uri, _KNOCK_S), seconds)
        if failure is not None:
            if self._reachable:
                reason = first_line(failure)[:_MAX_REASON]
                logger.warning(
                    "xpo: MLflow does not take what the run logs (%s); it waits in %s", reason, self._run_dir
                )
            self._wait = _RETRY_S if self._reachable else min(2 * self._wait, _MAX_RETRY_S)
            self._retry_at = time.monotonic() + self._wait
            self._reachable = False
        elif not self._reachable and not self._follower.behind:
            logger.warning("xpo: MLflow is back and has what waited")
            self._reachable = True
        self._saved = self._follower.save()
