"""A sweep and its runs, from its directory or from MLflow: the same either way."""

import ast
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from tqdm.auto import tqdm
from yaml import YAMLError

from xpo.config.errors import ConfigError, first_line, nearest
from xpo.config.files import jobs_of, read_object
from xpo.config.schema import flatten, may_change
from xpo.tracking.metrics_log import read_metrics
from xpo.tracking.mlflow_client import metric_name, reach, stored_key, tracking_uri
from xpo.tracking.runs import RunRecord, state_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

_MOST_NAMES = 8  # of runs, which make the name of a directory


@dataclass
class Run:
    """One job of a sweep. Of jobs that did not finish only name, state and reason are read."""

    name: str
    # "finished", or what became of it: failed, killed, timed out, stopped, not started, running, missing, changed
    state: str
    reason: str | None = None  # why it did not finish, if that is known
    config: dict[str, Any] = field(default_factory=dict)  # values and choices of groups by dotted key, without null
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # finite (step, value) by MLflow's name
    completions: list[dict[str, Any]] = field(default_factory=list)  # of the last evaluation: a row for each prompt

    def final(self, metric: str) -> float:
        """The last value of a metric."""
        return self.history[metric][-1][1]


@dataclass
class Sweep:
    """Jobs that differ in some keys and their seeds."""

    name: str  # MLflow's tag xpo.sweep
    command: str | None  # what started it; None if it was read from MLflow
    keys: list[str]  # the swept configuration keys, training.seed left out
    runs: list[Run]  # all jobs
    tracking_uri: str | None  # where its runs are tracked; None if they are not
    experiment: str  # of MLflow
    directory: Path | None = None  # None if it was read from MLflow


def find_sweep(names: Sequence[str], uri: str | None, experiment: str) -> Sweep:
    """What the command line names: a sweep's directory, else its name in MLflow; several runs; or the newest sweep."""
    if len(names) > 1:
        return from_runs([Path(name) for name in names], experiment)
    if not names:
        for directory in reversed(local_sweeps()):
            try:
                return from_directory(directory)
            except ConfigError as error:
                print(f"xpo: a sweep is passed over: {error}", file=sys.stderr)
        raise ConfigError("SWEEP is not given and multirun/ holds no sweep.json; give a directory or a sweep's name")
    if Path(names[0]).is_dir():
        return from_directory(Path(names[0]))
    return from_mlflow(names[0], tracking_uri(uri), experiment)


def from_runs(directories: Sequence[Path], experiment: str) -> Sweep:
    """Runs that were started one by one, as a sweep over what they differ in; ConfigError for what is no run."""
    runs = []
    for directory in directories:
        if not (directory / "run.json").is_file():
            raise ConfigError(f"RUN={str(directory)!r} holds no run.json; give outputs/DATE/TIME of runs, or one sweep")
        state, reason = state_of(directory, RunRecord.read(directory))
        runs.append(_read(directory, str(directory), state, reason))
    configs = [run.config for run in runs if run.config]
    every = {key: None for config in configs for key in config}
    differ = [key for key in every if len({str(config.get(key)) for config in configs}) > 1]
    groups = {key for key in differ if "." not in key}

    def said(key: str) -> bool:
        """Whether the option of its group stands for it: each has one value of it."""
        group = key.partition(".")[0]
        both = {(str(config.get(group)), str(config.get(key))) for config in configs}
        return group in groups - {key} and len(both) == len({option for option, _ in both})

    keys = [key for key in differ if not said(key) and (key == "training.max_steps" or not may_change(key))]
    keys = [key for key in keys if key not in ("experiment", "training.seed", "tracking", "launch", "sweep")]
    for config in configs:
        config.update({key: config.get(key, "null") for key in keys})
    names = [directory.name for directory in directories]
    name = " ".join(names) if len(names) < _MOST_NAMES else f"{names[0]} to {names[-1]}, {len(names)} runs"
    return Sweep(name, None, keys, runs, None, experiment)


def local_sweeps() -> list[Path]:
    """Directories of sweeps below multirun/, oldest first."""
    records = sorted(Path("multirun").rglob("sweep.json"), key=lambda path: path.stat().st_mtime)
    return [record.parent for record in records]


def from_directory(directory: Path) -> Sweep:
    """The sweep that a sweep.json describes; ConfigError if there is none in the directory, or it is damaged."""
    path = directory / "sweep.json"
    if not path.is_file():
        below = sorted(str(found.parent) for found in directory.rglob("sweep.json"))
        remedy = f"give {below[-1]}" if below else "give multirun/DATE/TIME of a sweep"
        raise ConfigError(f"SWEEP={str(directory)!r} holds no sweep.json; {remedy}")

    def build(jobs: list[dict[str, Any]], keys: list[str], **rest: Any) -> Sweep:
        runs = [_with_swept(_job(*job), keys) for job in jobs_of(directory)]
        return Sweep(keys=keys, runs=runs, directory=directory, **rest)

    return read_object(path, build)


def _with_swept(run: Run, keys: Iterable[str]) -> Run:
    """The run, its configuration with all swept keys that it holds in other words.

    MLflow writes some characters of a key in another way; a dictionary was flattened, here and there.
    """
    for key in keys:
        stored = stored_key(key)
        parts = {name[len(stored) + 1 :]: v for name, v in run.config.items() if name.startswith(f"{stored}.")}
        value = run.config.get(stored, ", ".join(f"{name}: {v}" for name, v in sorted(parts.items())) or None)
        if value is not None:
            run.config.setdefault(key, value)
    return run


def _job(job: dict[str, Any], run_dir: Path) -> Run:
    """A job of a sweep. Of its end its run knows best, which may have gone on alone since."""
    name, state, reason = job["name"], job["state"], job["reason"]
    if (run_dir / "run.json").is_file():
        try:
            record = RunRecord.read(run_dir)
        except ConfigError as error:
            return Run(name, "missing", str(error))
        if record.mixed:
            return Run(name, "changed", f"{run_dir} has gone on with other settings")
        if record.finished != (state == "finished"):
            state, reason = state_of(run_dir, record)
    return _read(run_dir, name, state, reason)


def _read(run_dir: Path, name: str, state: str, reason: str | None) -> Run:
    if state != "finished":
        return Run(name, state, reason)
    try:
        log = read_metrics(run_dir)
        if not log:
            return Run(name, "missing", f"{run_dir} holds no metrics.jsonl")
        config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))  # type: ignore[assignment]
        flat = RunRecord.read(run_dir).choices | {k: v for k, v in flatten(config).items() if v is not None}
        files = sorted((run_dir / "completions").glob("step_*.json"))
        rows = _rows(files[-1]) if files else []
    except (OSError, ValueError, TypeError, LookupError, YAMLError) as error:
        return Run(name, "missing", f"{run_dir} is damaged: {first_line(error)}")
    return Run(name, "finished", None, flat, _history(log), rows)


def _history(log: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The Trainer's log_history by metric. A value that was logged again at its step, by a resumed run, replaces."""
    points: dict[str, dict[int, float]] = {}
    for entry in log:
        if "train_runtime" not in entry:  # the Trainer's summary of a process, which MLflow is not sent
            for name, value in entry.items():
                if name != "step" and isinstance(value, Real) and math.isfinite(value):
                    points.setdefault(metric_name(name), {})[entry["step"]] = float(value)
    return {name: sorted(values.items()) for name, values in points.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    table = json.loads(path.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def connect(uri: str) -> "MlflowClient":
    """A client of a tracking server or database that is there; ConfigError if it is not."""
    try:
        return reach(uri)
    except Exception as error:  # of MLflow, SQLAlchemy, a socket, a missing driver
        raise ConfigError(
            f"--tracking-uri={uri!r} does not answer ({first_line(error)}); "
            "name the database or server that the runs went to"
        ) from error


def experiment_id(client: "MlflowClient", uri: str, experiment: str) -> str:
    """The id of an experiment by its name; ConfigError if there is none."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [each.name for each in client.search_experiments()]
        raise ConfigError(
            f"--experiment={experiment!r} is not in {uri}{nearest(experiment, names)}; it has {', '.join(names)}"
        )
    return found.experiment_id


def tagged(client: "MlflowClient", experiment: str, tag: str) -> list["StoredRun"]:
    """All runs of an experiment, by its id, that carry a tag, oldest first."""
    found: list[StoredRun] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment], f"tags.`{tag}` != ''", order_by=["attributes.start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


_STATES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "killed", "RUNNING": "running"}


def from_mlflow(name: str, uri: str, experiment: str) -> Sweep:
    """The sweep whose runs carry the tag xpo.sweep=NAME; ConfigError if there is none, or no answer."""
    local = [str(directory) for directory in local_sweeps()]
    try:
        client = connect(uri)
        runs = tagged(client, experiment_id(client, uri, experiment), "xpo.sweep")
    except ConfigError as error:
        raise ConfigError(f"SWEEP={name!r} is no directory{nearest(name, local)}, and {error}") from error
    names = sorted({run.data.tags["xpo.sweep"] for run in runs})
    mine = [run for run in runs if run.data.tags["xpo.sweep"] == name]
    if not mine:
        known = f"the last ones are {', '.join(map(repr, names[-3:]))}" if names else "it has none"
        raise ConfigError(
            f"SWEEP={name!r} is neither a directory nor a sweep in {uri}{nearest(name, names + local)}; {known}"
        )
    # The newest run has the keys of the last command; older ones may have been finished by an earlier one.
    keys = [key for key in mine[-1].data.tags.get("xpo.sweep_keys", "").split(",") if key]
    jobs: dict[str, StoredRun] = {}
    for run in mine:  # with sweep.rerun=true, jobs are there again: of each the newest that has finished, or the newest
        key = run.data.tags.get("xpo.job_key", run.info.run_id)
        if key not in jobs or run.info.status == "FINISHED" or jobs[key].info.status != "FINISHED":
            jobs[key] = run
    read = [
        _with_swept(_stored(client, run), keys)
        for run in tqdm(jobs.values(), desc="Reading", leave=False, disable=None)
    ]
    return Sweep(name, None, keys, read, uri, experiment)


def _stored(client: "MlflowClient", run: "StoredRun") -> Run:
    state = _STATES.get(run.info.status, "not started")
    if state != "finished":
        reason = run.data.tags.get("error", "").strip().splitlines()
        return Run(run.info.run_name, state, reason[-1] if reason else None)
    # What the worker and MLflow add is not in a run directory. final/X is the model's that was kept, which may be an
    # earlier one than the last that was evaluated.
    names = [key for key in run.data.metrics if not key.startswith(("final/", "system/"))]
    history: dict[str, list[tuple[int, float]]] = {}
    for key in names:
        values = {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        finite = sorted((step, value) for step, value in values.items() if math.isfinite(value))
        if finite:
            history[key] = finite
    for key, points in history.items():
        kept = run.data.metrics.get(key.replace("eval/", "final/", 1), math.nan)
        if key.startswith("eval/") and math.isfinite(kept):
            points[-1] = (points[-1][0], kept)
    config = {key: _parsed(text) for key, text in run.data.params.items()}
    return Run(run.info.run_name, "finished", None, config, history, _stored_rows(client, run.info.run_id))


def _stored_rows(client: "MlflowClient", run_id: str) -> list[dict[str, Any]]:
    files = sorted(file.path for file in client.list_artifacts(run_id, "completions"))
    if not files:
        return []
    with tempfile.TemporaryDirectory() as directory:
        return _rows(Path(client.download_artifacts(run_id, files[-1], directory)))


def _parsed(text: str) -> Any:
    """A param as the value it was: numbers, booleans, lists and null; anything else is text."""
    try:
        return None if text == "null" else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
