"""MLflow: one run per training run. What it logs is neither lost nor logged twice, also when MLflow is out of reach.

Imports neither torch nor, before a run is tracked, MLflow: a parent process starts at once.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from filelock import FileLock

from xpo.config.errors import ConfigError
from xpo.tracking.backlog import POINTS_AT_ONCE, Backlog, Entry, count, in_words, send

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_MAX_PARAM = 6000  # characters of a value that MLflow keeps
_MAX_KEY = 250  # characters of the name of a param or metric
_FLUSH_SECONDS = 2.0
_REACH_S = 10.0  # how long a server may take to answer for the first time: it may have to wake up
_KNOCK_S = 3.0  # how long a server or a lock may keep a training step waiting
_DRAIN_S = 3.0  # how long a training step sends what has piled up
_RETRY_S, _MAX_RETRY_S = 5.0, 60.0  # between attempts in training
_LAST_RETRY_AFTER_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # at the end of a run

# MLflow's client would try for minutes; the backlog does not lose anything by giving up early.
_SHORT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


# ---- MLflow within seconds ---------------------------------------------------------------------


def tracking_uri(uri: str | None) -> str:
    """The tracking server or database: `uri`, $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the working directory."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    return f"sqlite:///{_database(uri)}" if uri.startswith("sqlite:///") else uri


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).absolute()


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _knock(uri: str, seconds: float) -> None:
    """Finds out in `seconds` what MLflow's client would wait for: a server that is gone or hangs, a locked database.

    Raises:
        ConnectionError, sqlite3.Error: nobody answers.
    """
    if _is_server(uri):
        from mlflow.exceptions import MlflowException, RestException

        # By MLflow's client, which knows the user's certificates and passwords; and not by /health, which answers
        # while the server's database is locked.
        short = _environment(_SHORT | {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{seconds:.0f}"})
        try:
            with short:
                _client(uri).get_experiment("0")
        except RestException:
            pass  # a refusal is an answer
        except MlflowException as error:
            raise ConnectionError(first_line(_first_cause(error))) from error
    elif uri.startswith("sqlite:///"):
        file = f"file:{quote(str(_database(uri)))}?mode=rw"
        with contextlib.closing(sqlite3.connect(file, timeout=seconds, isolation_level=None, uri=True)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")


@contextlib.contextmanager
def _short_calls() -> Iterator[None]:
    """Within it, MLflow's HTTP client gives up after seconds, unless the environment says otherwise."""
    with _environment({name: value for name, value in _SHORT.items() if name not in os.environ}):
        yield


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Within it, environment variables have these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    # mlflow.store.db logs tracebacks of what it raises, which is reported here in one line.
    for name, level in (("alembic", "WARNING"), ("mlflow", "WARNING"), ("mlflow.store.db", "CRITICAL")):
        logging.getLogger(name).setLevel(level)
    return MlflowClient(uri)


def reach(uri: str) -> "MlflowClient":
    """A client of a server or database that exists and answers.

    Raises:
        Exception: whatever its driver raises if it does not.
    """
    _knock(uri, _REACH_S)
    return _client(uri)


def mark_ended(uri: str | None, run_id: str, status: str) -> bool:
    """Sets a run that MLflow still calls running to KILLED or FAILED.

    Returns:
        Whether MLflow was reached.
    """
    try:
        with _short_calls():
            client = reach(tracking_uri(uri))
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, status)
    except Exception:  # see Backlog.drain
        return False
    return True


def set_tags(uri: str | None, run_ids: Iterable[str], tags: dict[str, str]) -> bool:
    """Sets tags of runs.

    Returns:
        Whether MLflow took all of them.
    """
    from mlflow.entities import RunTag

    try:
        with _short_calls():
            client = reach(tracking_uri(uri))
            for run_id in run_ids:
                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    except Exception:  # see Backlog.drain
        return False
    return True


_FIRST_SECTIONS = ("eval", "objective", "rewards", "preference", "loss")
_BEST = "metrics.`final/win_rate`"


def chart_link(uri: str | None, experiment_id: str, sweep: str | None = None, view: str | None = None) -> str:
    """The UI's charts of an experiment, or of one sweep (tag xpo.sweep). A database needs `mlflow ui` running.

    Args:
        view: the key of a saved view, from `save_view`; it brings its own filter.
    """
    uri = tracking_uri(uri)
    base = uri.rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if view is not None:
        query["viewStateShareKey"] = view  # the UI would ignore it beside a filter
    elif sweep is not None:
        query |= {"searchFilter": _filter(sweep), "orderByKey": _BEST, "orderByAsc": "false"}
    return f"{base}/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote, safe='')}"


def _filter(sweep: str) -> str:
    return f'tags."xpo.sweep" = "{sweep}"'


def save_view(uri: str | None, experiment_id: str, sweep: str, keys: Sequence[str]) -> str | None:
    """Saves a view of a sweep's runs, "Sweep NAME" in the UI's menu Views: the charts that compare them, then the rest.

    The UI keeps saved views in tags of the experiment.

    Args:
        keys: what was swept, as dotted keys.

    Returns:
        The key of the view, for `chart_link`; None if MLflow did not take it.
    """
    params = ["loss.log10_alpha" if key == "loss.alpha" else key for key in keys]  # alphas are powers of ten
    lines: list[dict[str, Any]] = [
        {"type": "LINE", "metricKey": key, "selectedMetricKeys": [key], "xAxisKey": "step", "useGlobalXaxisKey": True}
        | {"useGlobalLineSmoothing": True, "lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear"}
        | {"yAxisKey": "metric", "yAxisExpressions": [], "range": {}, "displayName": key}
        for key in ("eval/win_rate", "eval/score", "eval/kl")
    ]
    axes = {axis: {"key": key, "type": "METRIC"} for axis, key in (("xaxis", "final/kl"), ("yaxis", "final/win_rate"))}
    others: list[dict[str, Any]] = [
        {"type": "SCATTER", **axes},
        {"type": "PARALLEL", "selectedParams": params, "selectedMetrics": ["final/win_rate"], "showAllRuns": False},
    ]
    common = {"metricSectionId": "Sweep", "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    state = {
        "searchFilter": _filter(sweep),
        "orderByKey": _BEST,
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",  # the UI would draw ten of them
        "compareRunCharts": [chart | common | {"uuid": f"sweep {n}"} for n, chart in enumerate(lines + others)],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False} for name in ("Sweep", *_FIRST_SECTIONS)
        ],
        "isAccordionReordered": True,  # those that are not named follow
    }
    now = int(time.time() * 1000)
    view = {"name": f"Sweep {sweep}", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    key = hashlib.sha256(sweep.encode()).hexdigest()[:12]
    try:
        with _short_calls():
            reach(tracking_uri(uri)).set_experiment_tag(
                experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(view)
            )
    except Exception:  # see Backlog.drain
        return None
    return key


def held_points(client: "MlflowClient", run: "Run", keys: Iterable[str]) -> set[tuple[str, int]]:
    """(key, step) of every point that MLflow holds of these metrics."""
    known = set(keys) & run.data.metrics.keys()
    return {(key, point.step) for key in known for point in client.get_metric_history(run.info.run_id, key)}


# ---- a run -------------------------------------------------------------------------------------


class MLflowRun:
    """A run in MLflow. Points are buffered and sent together; a resumed run knows what it holds.

    When MLflow is out of reach, training goes on: what the run logs waits in a Backlog, and is sent in order as soon
    as MLflow is back, by this process, by a resumed one, or by `python -m xpo.track replay`.

    Args:
        uri: tracking server or database; None for a database in the working directory.
        experiment: name of the experiment; made at first use.
        run_name: what the UI calls the run.
        params: configuration values by dotted key. Those that the run already has stay as they are.
        tags: texts by name.
        run_id: the run to go on with; None starts a new one.
        backlog: the file that keeps what MLflow does not take. What an earlier process left there is sent first.
        color: of a new run in the UI's charts, "#rrggbb".

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
        backlog: Path | None = None,
        color: str | None = None,
    ):
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri = tracking_uri(uri)
        self._sweep = tags.get("xpo.sweep")
        self._points: list[list[Any]] = []  # key, value, time, step
        self._backlog = Backlog(backlog)
        self._wait = _RETRY_S
        self._retry_at = -math.inf
        self._reachable = True
        try:
            self.client, self.experiment_id = self._connect(experiment)
            self.run_id = run_id if run_id and self._exists(run_id) else self._create(run_name, color)
            run = self.client.get_run(self.run_id)
            self._logged = held_points(self.client, run, run.data.metrics)
            self._take_up(experiment)
            self._describe(run, params, tags)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:  # ImportError: the database's driver
            raise ConfigError(
                f"tracking.uri={self.uri!r} does not answer ({first_line(error)}); correct it, or set tracking=none"
            ) from error
        self._flushed_at = time.monotonic()

    def _connect(self, experiment: str) -> tuple["MlflowClient", str]:
        """A client, and the experiment's id. Concurrent first starts on an empty database must not race."""
        if not self.uri.startswith("sqlite:///"):
            client = reach(self.uri)
            return client, self._experiment(client, experiment, None)
        database = _database(self.uri)
        database.parent.mkdir(parents=True, exist_ok=True)
        artifacts = database.parent / "mlruns" / experiment
        with FileLock(f"{database}.lock"):  # the client itself makes the tables
            client = _client(self.uri)
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
        return found.experiment_id

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # trouble of the moment must not begin a second run
                raise
            return False

    def _create(self, run_name: str, color: str | None) -> str:
        tags = {} if color is None else {"mlflow.runColor": color}
        return self.client.create_run(self.experiment_id, run_name=run_name, tags=tags).info.run_id

    def _take_up(self, experiment: str) -> None:
        """Sends the backlog of an earlier process. If its run is gone from MLflow, this one has it all."""
        left_behind = bool(self._backlog.where)
        self._backlog.belongs({"uri": self.uri, "experiment": experiment, "run_id": self.run_id})
        if left_behind:
            self._backlog.forget(self._logged)
            self._backlog.entries = [entry for entry in self._backlog.entries if "status" not in entry]  # it goes on
            self._drain()

    def _describe(self, run: "Run", params: dict[str, Any], tags: dict[str, str]) -> None:
        """Logs params and tags."""
        from mlflow.entities import Param, RunTag

        texts = {stored_key(key): str(value)[:_MAX_PARAM] for key, value in params.items() if value is not None}
        new = [Param(key, text) for key, text in texts.items() if key not in run.data.params]
        self.client.log_batch(self.run_id, params=new, tags=[RunTag(key, value) for key, value in tags.items()])
        self.client.update_run(self.run_id, status="RUNNING")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Adds points to the buffer, except those that the run already has at this step."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            key = stored_key(name)
            if (key, step) not in self._logged:
                self._logged.add((key, step))
                self._points.append([key, float(value), now, step])
        if len(self._points) >= POINTS_AT_ONCE or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends the buffer, behind what waits already; it never waits for long."""
        points, self._points = self._points, []
        chunks = range(0, len(points), POINTS_AT_ONCE)
        self._log(*({"metrics": points[start : start + POINTS_AT_ONCE]} for start in chunks))
        self._flushed_at = time.monotonic()

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Stores a file among the run's artifacts: as it is when MLflow takes it."""
        path, directory = path.absolute(), self._backlog.directory.absolute()
        inside = path.relative_to(directory) if path.is_relative_to(directory) else path  # the directory may move
        self._log({"file": str(inside), "folder": folder})

    def set_tag(self, key: str, value: str) -> None:
        """Sets one tag."""
        self._log({"tag": [key, value]})

    def finish(self, status: str = "FINISHED") -> None:
        """Sends what is left, trying for a minute or so, and ends the run as FINISHED, FAILED or KILLED."""
        self.flush()
        self._log({"status": status, "time": int(time.time() * 1000)})
        for wait in _LAST_RETRY_AFTER_S:
            if not self._backlog.entries:
                return
            time.sleep(wait)
            self._drain()
        if self._backlog.unsaved:
            lost = in_words(count(self._backlog.unsaved))
            logger.warning("xpo: the end of this run is lost (%s): neither MLflow nor a file has taken it", lost)
        if self._backlog.saved:
            left = in_words(count(self._backlog.entries))
            command = shlex.join(["python", "-m", "xpo.track", "replay", str(self._backlog.directory)])
            logger.warning("xpo: MLflow lacks the end of this run (%s); send it with: %s", left, command)

    def ui_command(self) -> str:
        """What opens the UI: a server's charts of this run's sweep or experiment, or the command that starts one."""
        if _is_server(self.uri):
            return chart_link(self.uri, self.experiment_id, self._sweep)
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def _log(self, *entries: Entry) -> None:
        for entry in entries:
            self._backlog.append(entry)
        if not self._reachable:
            self._backlog.save()  # before the next attempt, which may take seconds
        if self._backlog.entries and time.monotonic() >= self._retry_at:
            self._drain(_DRAIN_S)

    def _drain(self, seconds: float = math.inf) -> None:
        """Sends what waits; after a failure the next attempt is a while away."""
        failure = self._backlog.drain(self._send, seconds)
        if failure is not None:
            if self._reachable:
                reason, place = first_line(failure), self._backlog.path or "memory"
                logger.warning("xpo: MLflow does not take what the run logs (%s); it waits in %s", reason, place)
            self._wait = _RETRY_S if self._reachable else min(2 * self._wait, _MAX_RETRY_S)
            self._retry_at = time.monotonic() + self._wait
            self._reachable = False
        elif not self._reachable and not self._backlog.entries:
            logger.warning("xpo: MLflow is back and has what waited")
            self._reachable = True
        self._backlog.save()

    def _send(self, entry: Entry) -> None:
        with _short_calls():
            _knock(self.uri, _KNOCK_S)
            send(self.client, self.run_id, entry, self._backlog.directory)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _first_cause(error: BaseException) -> BaseException:
    """What an error came of in the end; MLflow tells of the whole request."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def stored_key(name: str) -> str:
    """`name` as MLflow takes it for a param or metric."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_KEY]


def metric_name(name: str) -> str:
    """MLflow's name of a Trainer log: "eval_win_rate" is eval/win_rate; the UI groups by the prefix."""
    return name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name


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
