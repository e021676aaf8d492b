"""A sweep: its jobs, in processes of their own, some at the same time; what has been done is not done again.

Every job is composed and checked before the first one starts. Jobs are told apart by what they compute
(`xpo.tracking.runs.job_key`), so a repeated command skips those that have finished, wherever they lie, and goes on with
those that were interrupted. A job that fails costs itself only. SWEEP_DIR/sweep.json says what became of each.
Layer 0: no torch.
"""

import itertools
import json
import os
import queue
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xpo.config.compose import checked, without_hydra
from xpo.config.errors import ConfigError, RunInUse
from xpo.config.options import LaunchOptions
from xpo.config.schema import TrainSchema, to_dict
from xpo.launch.jobs import prepare, repeatable
from xpo.launch.processes import JobProcess, Outcome, exit_statuses, passing_on_signals, signals
from xpo.tracking.mlflow_run import chart_link, mark_ended, save_view, set_tags, tracking_uri
from xpo.tracking.runs import RunRecord, in_use, job_key, last_evaluation, resumable_checkpoint

ABBREVIATIONS = {"alpha": "a", "beta": "b", "missing_eos_penalty": "e", "seed": "s", "learning_rate": "lr"}
COLORS = (  # of Okabe and Ito, then darker ones: told apart by the colour-blind too
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#004C7A", "#8F3E00", "#00604A", "#8A4A6E", "#9A6A00", "#2C6F96"),
)
DONE = "finished"
ELSEWHERE = "running elsewhere"
STATES = {DONE: "green", "stopped": "yellow", ELSEWHERE: "yellow", "not started": "yellow"}


@dataclass
class Job:
    """One job of a sweep, as sweep.json has it."""

    name: str
    point: dict[str, Any]  # the swept keys, and the seed
    run_dir: str
    job_key: str
    state: str = "not started"
    reason: str | None = None
    before: bool = False  # it had finished before this command
    seconds: float = 0.0
    mlflow_run_id: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, without "eval_"


@dataclass
class Sweep:
    """The content of sweep.json."""

    name: str
    command: str
    keys: list[str]
    jobs: list[Job]
    tracking_uri: str | None
    experiment: str

    def write(self, directory: Path) -> None:
        """Puts it into `directory`, whole or not at all."""
        unfinished = directory / "sweep.json.part"
        unfinished.write_text(json.dumps(asdict(self), indent=1))
        unfinished.replace(directory / "sweep.json")


Composed = tuple[DictConfig, list[str]]  # a job's configuration, Hydra's part included, and its overrides


def run(
    compose: Callable[[list[str], int], DictConfig],
    batch: Sequence[Sequence[str]],
    first: int,
    swept: Sequence[str] = (),
) -> list[Job]:
    """Runs jobs and reports on them; the sweeper may call this several times, once per batch.

    Args:
        compose: from overrides and the number of a job to its configuration.
        batch: the overrides of each point.
        first: the number of the first point.
        swept: the keys that the sweeper chooses, as far as they are known: a batch may be a single point.

    Returns:
        The jobs, those of the first point first.

    Raises:
        ConfigError: what is wrong with any of the jobs, before one has started.
    """
    seeded = [overrides for point in batch for overrides in with_seeds(list(point), _schema(compose(list(point), 0)))]
    before = first * len(seeded) // len(batch)  # jobs of earlier batches
    configs = [compose(overrides, before + i) for i, overrides in enumerate(seeded)]
    schemas = [_schema(config) for config in configs]
    resume = schemas[0].training.resume
    if resume is not None:
        raise ConfigError(f"training.resume={resume!r} names one run, and a sweep goes on by itself; remove it")
    if schemas[0].sweep.seeds > 1 and "training.seed" in swept:
        raise ConfigError(
            f"sweep.seeds={schemas[0].sweep.seeds} goes over training.seed, which is swept too; remove one of them"
        )
    widest = max(schemas, key=lambda schema: schema.launch.num_processes)
    slots(widest.launch)
    directory = Path(configs[0].hydra.sweep.dir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    given = [dict(override.lstrip("+").partition("=")[::2] for override in overrides) for overrides in seeded]
    keys = [key for key in given[0] if key in swept or len({point.get(key) for point in given}) > 1]
    jobs = [
        Job(
            name=short_name({key: point[key] for key in keys}) or "run",
            point={key: point[key] for key in keys},
            run_dir=str(directory / str(config.hydra.sweep.subdir)),
            job_key=job_key(to_dict(schema)),
        )
        for config, schema, point in zip(configs, schemas, given, strict=True)
    ]
    sweep = _continued(directory, jobs, [key for key in keys if key != "training.seed"], schemas[0])
    Runner(sweep, directory, widest).run(jobs, configs)
    return jobs


def _schema(config: DictConfig) -> TrainSchema:
    return checked(without_hydra(config))


def with_seeds(overrides: list[str], config: TrainSchema) -> list[list[str]]:
    """The overrides of a point, once for each of `sweep.seeds` seeds."""
    if config.sweep.seeds == 1:
        return [overrides]
    others = [override for override in overrides if override.partition("=")[0] != "training.seed"]
    seeds = range(config.training.seed, config.training.seed + config.sweep.seeds)
    return [[*others, f"training.seed={seed}"] for seed in seeds]


def short_name(point: dict[str, str]) -> str:
    """A name that fits into the MLflow UI: "a1e-5 b0.1"."""
    words = {key: key.rpartition(".")[2] for key in point}
    letters = {
        key: ABBREVIATIONS.get(word) or "".join(part[0] for part in word.split("_")) for key, word in words.items()
    }
    common = [letter for letter in letters.values() if list(letters.values()).count(letter) > 1]
    return " ".join(
        (words[key] if letters[key] in common else letters[key]) + re.sub(r"e-0(\d)$", r"e-\1", value)
        for key, value in point.items()
    )


def _continued(directory: Path, jobs: list[Job], keys: list[str], config: TrainSchema) -> Sweep:
    """The sweep that the jobs belong to: the one in the directory, or one with the same jobs, or a new one."""
    tracked = config.tracking
    sweep = Sweep(
        name=config.sweep.name or f"{directory.parent.name} {directory.name}",
        command=shlex.join(["python", "-m", "xpo.train", *sys.argv[1:]]),
        keys=keys,
        jobs=jobs,
        tracking_uri=tracking_uri(tracked.uri) if tracked.enabled else None,
        experiment=tracked.experiment,
    )
    here = directory / "sweep.json"
    if here.exists():  # an earlier batch, or the same command in the same directory
        before = json.loads(here.read_text())
        ours = {job.job_key for job in jobs}
        sweep.jobs = [Job(**job) for job in before["jobs"] if job["job_key"] not in ours] + jobs
        sweep.keys = list(dict.fromkeys([*before["keys"], *keys]))
        sweep.name = config.sweep.name or before["name"]
    elif config.sweep.name is None:
        ours = {job.job_key for job in jobs}
        for file in sorted(Path("multirun").rglob("sweep.json"), key=lambda file: file.stat().st_mtime, reverse=True):
            before = json.loads(file.read_text())
            if {job["job_key"] for job in before["jobs"]} == ours:
                sweep.name = before["name"]
                break
    return sweep


def slots(launch: LaunchOptions) -> list[list[int] | None]:
    """The GPUs of each job that runs at the same time; None for all of them, or where there are none.

    Raises:
        ConfigError: several jobs at once would use the same GPUs.
    """
    if launch.jobs == 1:
        return [launch.devices]
    devices = launch.devices
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices is None and all(number.isdigit() for number in visible):
        devices = [int(number) for number in visible]
    needed = launch.jobs * launch.num_processes
    if devices is None and shutil.which("nvidia-smi") is None:
        return [None] * launch.jobs
    if devices is None or len(devices) < needed:
        raise ConfigError(
            f"launch.jobs={launch.jobs} with launch.num_processes={launch.num_processes} needs {needed} GPUs of its own"
            f", and launch.devices={devices}; give it that many, as launch.devices=[0,1]"
        )
    return [devices[start : start + launch.num_processes] for start in range(0, needed, launch.num_processes)]


class Runner:
    """Runs the jobs of a batch.

    Args:
        sweep: what sweep.json says.
        directory: where it lies.
        config: of the job with the most processes: the rest of launch, and sweep, are the same in all.
    """

    def __init__(self, sweep: Sweep, directory: Path, config: TrainSchema):
        self.sweep = sweep
        self.directory = directory
        self.launch = config.launch
        self.rerun = config.sweep.rerun
        self.console = Console(highlight=False)
        self.slots: queue.Queue[list[int] | None] = queue.Queue()
        for devices in slots(self.launch):
            self.slots.put(devices)
        self._running: list[JobProcess] = []
        self._writing = threading.Lock()

    def run(self, jobs: Sequence[Job], configs: Sequence[DictConfig]) -> None:
        """All jobs that have not finished before, to their end or to a signal."""
        runs = _runs_by_key([Path("outputs"), Path("multirun"), self.directory])
        to_do: list[tuple[Job, Path]] = []
        for job, config in zip(jobs, configs, strict=True):
            try:
                if not self._finished_before(job, runs):
                    to_do.append((job, self._prepare(job, config, runs)))
            except RunInUse:
                job.state, job.reason = ELSEWHERE, f"{job.run_dir} is in use"
        self._announce(jobs, to_do)
        self.sweep.write(self.directory)
        try:
            with passing_on_signals(self._stop), ThreadPoolExecutor(self.launch.jobs) as pool:
                for future in [pool.submit(self._work, *item, n, len(to_do)) for n, item in enumerate(to_do, start=1)]:
                    future.result()
        finally:
            self._collect()
        failed = any(job.state not in (DONE, ELSEWHERE) for job in jobs)
        exit_statuses.append(128 + signals[0] if signals else int(failed))
        self.report()

    # ---- one job -----------------------------------------------------------------------------

    def _finished_before(self, job: Job, runs: dict[str, list[Path]]) -> bool:
        """Whether there is nothing to do for a job; if it was interrupted, its directory is that of its run."""
        if self.rerun:
            return False
        for run_dir in runs.get(job.job_key, []):
            if RunRecord.read(run_dir).finished:
                job.state, job.before, job.run_dir = DONE, True, str(run_dir)
                return True
        for run_dir in runs.get(job.job_key, [])[:1]:
            job.run_dir = str(run_dir)
        return False

    def _prepare(self, job: Job, config: DictConfig, runs: dict[str, list[Path]]) -> Path:
        run_dir = Path(job.run_dir)
        begun = not self.rerun and run_dir in runs.get(job.job_key, [])
        if not begun:
            job.run_dir = str(run_dir := _without_run(run_dir))
        tags = _tags(self.sweep) | {"mlflow.runColor": COLORS[self.sweep.jobs.index(job) % len(COLORS)]}
        return prepare(
            without_hydra(config),
            run_dir,
            dict(config.hydra.runtime.choices),
            # For whoever goes on with this job alone.
            [*repeatable(config.hydra.overrides.task, config.hydra.overrides.hydra), "hydra.mode=RUN"],
            name=job.name,
            tags=tags,
            found=(run_dir, resumable_checkpoint(run_dir)) if begun else None,
        )

    def _work(self, job: Job, run_dir: Path, number: int, count: int) -> None:
        """One job in a thread: waits for a slot, and for the end of its processes."""
        devices = self.slots.get()
        started = time.monotonic()
        try:
            if signals:
                return
            # Another command may have taken up this job while it waited.
            if RunRecord.read(run_dir).finished:
                job.state, job.before = DONE, True
                return
            if in_use(run_dir):
                job.state, job.reason = ELSEWHERE, f"{run_dir} is in use"
                return
            alone = self.launch.jobs == 1
            output = None if alone else run_dir / "output.log"
            self._say(number, count, job, "starts" + ("" if alone else f", its output in {output}"))
            process = JobProcess(run_dir, devices, self.launch.jobs, output)
            self._running.append(process)
            if signals:  # that came while it was started
                process.stop(signals[0])
            outcome = process.wait()
            self._running.remove(process)
        except ConfigError as error:
            outcome = Outcome("failed", 2, str(error))
        finally:
            self.slots.put(devices)
        job.state, job.reason, job.seconds = outcome.state, outcome.reason, time.monotonic() - started
        with self._writing:
            self._say(number, count, job, outcome.state + (f": {outcome.reason}" if outcome.reason else ""))
            self.sweep.write(self.directory)

    def _stop(self, number: int) -> None:
        for process in list(self._running):
            process.stop(number)

    # ---- what is said ------------------------------------------------------------------------

    def _say(self, number: int, count: int, job: Job, what: str) -> None:
        self.console.print(f"[bold]Job {number} of {count}[/]  {escape(job.name)}  {escape(what)}", soft_wrap=True)

    def _announce(self, jobs: Sequence[Job], to_do: Sequence[tuple[Job, Path]]) -> None:
        resumed = sum(RunRecord.read(run_dir).resume_from is not None for _, run_dir in to_do)
        parts = [f"{len(jobs)} jobs"]
        parts += [f"{sum(job.before for job in jobs)} finished before"] * any(job.before for job in jobs)
        parts += [f"{resumed} go on from a checkpoint"] * bool(resumed)
        elsewhere = sum(job.state == ELSEWHERE for job in jobs)
        parts += [f"{elsewhere} {ELSEWHERE}"] * bool(elsewhere)
        self.console.print(f"Sweep {self.sweep.name!r}: {', '.join(parts)}", soft_wrap=True)

    def _collect(self) -> None:
        """What the runs left: their metrics and their place in MLflow, where none may seem to run that does not."""
        for job in self.sweep.jobs:
            run_dir = Path(job.run_dir)
            if not (run_dir / "run.json").exists():
                continue
            job.mlflow_run_id = RunRecord.read(run_dir).mlflow_run_id
            job.metrics = last_evaluation(run_dir)
            if job.mlflow_run_id and self.sweep.tracking_uri and job.state in ("failed", "killed", "timed out"):
                mark_ended(self.sweep.tracking_uri, job.mlflow_run_id, "FAILED" if job.state == "failed" else "KILLED")
        before = [job.mlflow_run_id for job in self.sweep.jobs if job.before and job.mlflow_run_id]
        if before and self.sweep.tracking_uri:
            set_tags(self.sweep.tracking_uri, before, _tags(self.sweep))
        self.sweep.write(self.directory)

    def report(self) -> None:
        """A table of all jobs, and how to compare them."""
        names = [name for name in ("win_rate", "score", "kl") if any(name in job.metrics for job in self.sweep.jobs)]
        table = Table(title=f"Sweep {self.sweep.name}", title_justify="left")
        for title in ("job", "state", *(name.replace("_", " ") for name in names), "minutes"):
            table.add_column(title, justify="left" if title in ("job", "state") else "right")
        for job in self.sweep.jobs:
            values = [f"{job.metrics[name]:.3f}" if name in job.metrics else "" for name in names]
            state = f"[{STATES.get(job.state, 'red')}]{job.state}[/]" + (" before" if job.before else "")
            table.add_row(escape(job.name), state, *values, f"{job.seconds / 60:.1f}" if job.seconds else "")
        self.console.print(table)
        for job in self.sweep.jobs:
            if job.reason:
                self.console.print(f"{escape(job.name)}: {job.state}: {escape(job.reason)}", soft_wrap=True)
        self.console.print(f"Compare: python -m xpo.compare {shlex.quote(_short(self.directory))}", soft_wrap=True)
        records = [RunRecord.read(Path(job.run_dir)) for job in self.sweep.jobs if job.mlflow_run_id]
        experiments = [record.mlflow_experiment_id for record in records if record.mlflow_experiment_id]
        if self.sweep.tracking_uri and experiments:
            if not self.sweep.tracking_uri.startswith("http"):
                self.console.print(
                    f"MLflow:  mlflow ui --backend-store-uri {shlex.quote(self.sweep.tracking_uri)}, then",
                    soft_wrap=True,
                )
            place = (self.sweep.tracking_uri, experiments[0], self.sweep.name)
            link = chart_link(*place, save_view(*place, self.sweep.keys))
            self.console.print(f"         {link}", soft_wrap=True)
        if any(job.state != DONE for job in self.sweep.jobs):
            self.console.print("Repeat the command to finish the rest.", soft_wrap=True)


def _tags(sweep: Sweep) -> dict[str, str]:
    """What tells the runs of a sweep apart in MLflow."""
    return {"xpo.sweep": sweep.name, "xpo.sweep_keys": ",".join(sweep.keys)}


def _runs_by_key(roots: Sequence[Path]) -> dict[str, list[Path]]:
    """Run directories by the job key of their runs, the newest first."""
    files = {file.resolve() for root in roots for file in root.rglob("run.json")}
    runs: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        runs.setdefault(RunRecord.read(file.parent).job_key, []).append(file.parent)
    return runs


def _without_run(run_dir: Path) -> Path:
    """The directory, or RUN_DIR-2 and so on if it holds a run: a sweep's directory may be used for more values."""
    free = run_dir
    for number in itertools.count(2):
        if not (free / "run.json").exists():
            break
        free = run_dir.with_name(f"{run_dir.name}-{number}")
    return free


def _short(directory: Path) -> str:
    """The path as one would type it here."""
    return str(directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory)
