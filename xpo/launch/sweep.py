"""A sweep: its jobs, in processes of their own, some at the same time; what has been done is not done again.

Every job is composed and checked before the first one starts. Jobs are told apart by what they compute
(`xpo.tracking.runs.job_key`), so a repeated command skips those that have finished, wherever they lie, and goes on with
those that were interrupted. A job that fails costs itself only. SWEEP_DIR/sweep.json says what became of each.
Layer 0: no torch.
"""

import itertools
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig

from xpo.config.compose import checked, without_hydra
from xpo.config.errors import ConfigError, RunInUse
from xpo.config.options import LaunchOptions
from xpo.config.schema import TrainSchema, to_dict
from xpo.launch.jobs import prepare, repeatable
from xpo.launch.processes import JobProcess, Outcome, exit_statuses, passing_on_signals, signals
from xpo.launch.sweep_record import COLORS, DONE, ELSEWHERE, Job, Sweep, SweepReport, continued, earlier, short_name
from xpo.tracking.mlflow_client import mark_ended, set_tags
from xpo.tracking.runs import RunRecord, all_runs, in_use, job_key, last_evaluation, resumable_checkpoint


def run(
    compose: Callable[[list[str], int], DictConfig],
    batch: Sequence[Sequence[str]],
    first: int,
    swept: Sequence[str] = (),
    new: bool = False,
) -> list[Job]:
    """Runs jobs, reports on them and returns them in order; the sweeper may call this once per batch.

    Args:
        compose: from overrides and the number of a job to its configuration.
        batch: the overrides of each point.
        first: the number of the first point.
        swept: the keys that the sweeper chooses, as far as they are known: a batch may be a single point.
        new: whether the sweep's directory was made for this batch alone. If it repeats an earlier sweep, it goes on in
            that one's.

    ConfigError for what is wrong with any of the jobs, before one has started.
    """
    seeded = [words for point in batch for words in with_seeds(list(point), _schema(compose(list(point), 0)))]
    before = first * len(seeded) // len(batch)  # jobs of earlier batches
    configs = [compose(overrides, before + i) for i, overrides in enumerate(seeded)]
    schemas = [_schema(config) for config in configs]
    resume, seeds = schemas[0].training.resume, schemas[0].sweep.seeds
    if resume is not None:
        raise ConfigError(f"training.resume={resume!r} names one run, and a sweep goes on by itself; remove it")
    if seeds > 1 and "training.seed" in swept:
        raise ConfigError(f"sweep.seeds={seeds} goes over training.seed, which is swept too; remove one of them")
    widest = max(schemas, key=lambda schema: schema.launch.num_processes)
    slots(widest.launch)
    directory = Path(configs[0].hydra.sweep.dir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    given = [dict(override.lstrip("+").partition("=")[::2] for override in overrides) for overrides in seeded]
    keys = [key for key in given[0] if key in swept or len({point.get(key) for point in given}) > 1]
    jobs = []
    for config, schema, values in zip(configs, schemas, given, strict=True):
        point = {key: values[key] for key in keys}
        jobs.append(Job(short_name(point) or "run", point, str(config.hydra.sweep.subdir), job_key(to_dict(schema))))
    sweep = schemas[0].sweep
    if new and not sweep.rerun and (there := earlier(jobs, sweep.name)) is not None:
        (directory / "multirun.yaml").replace(there / "multirun.yaml")  # Hydra's
        directory.rmdir()
        directory = there
    for job in jobs:
        job.run_dir = str(directory / job.run_dir)
    record = continued(directory, jobs, [key for key in keys if key != "training.seed"], schemas[0])
    Runner(record, jobs, directory, widest).run(configs)
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


def slots(launch: LaunchOptions) -> list[list[int] | None]:
    """The GPUs of each job that runs at the same time, None for all there are; ConfigError if jobs would share."""
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
    """Runs the jobs of a batch. `config` is that with most processes: the rest of launch, and sweep, are equal."""

    def __init__(self, sweep: Sweep, jobs: Sequence[Job], directory: Path, config: TrainSchema):
        self.sweep = sweep
        self.jobs = jobs
        self.directory = directory
        self.launch = config.launch
        self.rerun = config.sweep.rerun
        self.report = SweepReport(sweep, directory)
        self.slots: queue.Queue[list[int] | None] = queue.Queue()
        for devices in slots(self.launch):
            self.slots.put(devices)
        self._running: list[JobProcess] = []
        self._writing = threading.Lock()
        self._lock = FileLock(directory / "sweep.lock")  # against other commands with the same directory

    def run(self, configs: Sequence[DictConfig]) -> None:
        """All jobs that have not finished before, to their end or to a signal."""
        to_do: list[tuple[Job, Path]] = []
        with self._lock:
            self.sweep.take_in(self.directory, self.jobs)
            runs = _runs_by_key([Path("outputs"), Path("multirun"), self.directory])
            for job, config in zip(self.jobs, configs, strict=True):
                try:
                    run_dir = self._prepare(job, config, runs)
                except RunInUse:
                    job.state, job.reason = ELSEWHERE, f"{job.run_dir} is in use"
                    continue
                if run_dir is not None:
                    to_do.append((job, run_dir))
            self.sweep.write(self.directory, self.jobs)
        self.report.announce(self.jobs, [run_dir for _, run_dir in to_do])
        try:
            with passing_on_signals(self._stop), ThreadPoolExecutor(self.launch.jobs) as pool:
                for future in [pool.submit(self._work, *item, n, len(to_do)) for n, item in enumerate(to_do, start=1)]:
                    future.result()
        finally:
            self._collect()
        failed = any(job.state not in (DONE, ELSEWHERE) for job in self.jobs)
        exit_statuses.append(128 + signals[0] if signals else int(failed))
        self.report.summary()

    def _prepare(self, job: Job, config: DictConfig, runs: dict[str, list[Path]]) -> Path | None:
        """The run directory of a job, ready to train, and its own if it was interrupted; None if it has finished."""
        begun = [] if self.rerun else runs.get(job.job_key, [])
        for run_dir in begun:
            if RunRecord.read(run_dir).finished:
                job.state, job.before, job.run_dir = DONE, True, str(run_dir)
                return None
        run_dir = begun[0] if begun else _without_run(Path(job.run_dir))
        job.run_dir = str(run_dir)
        return prepare(
            without_hydra(config),
            run_dir,
            dict(config.hydra.runtime.choices),
            [*repeatable(config.hydra), "hydra.mode=RUN"],  # for whoever goes on with this job alone
            name=job.name,
            tags=self.sweep.tags() | {"mlflow.runColor": COLORS[self.sweep.jobs.index(job) % len(COLORS)]},
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
            self.report.say(number, count, job, "starts" + ("" if alone else f", its output in {output}"))
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
        with self._writing, self._lock:
            self.report.say(number, count, job, outcome.state + (f": {outcome.reason}" if outcome.reason else ""))
            self._record()

    def _stop(self, number: int) -> None:
        for process in list(self._running):
            process.stop(number)

    def _collect(self) -> None:
        """What the runs left: their metrics and their place in MLflow, where none may seem to run that does not."""
        for job in self.jobs:
            run_dir = Path(job.run_dir)
            if not (run_dir / "run.json").exists():
                continue
            try:
                job.mlflow_run_id = RunRecord.read(run_dir).mlflow_run_id
                job.metrics = last_evaluation(run_dir)
            except ConfigError as error:
                print(f"xpo: a run is passed over: {error}", file=sys.stderr)
            if job.mlflow_run_id and self.sweep.tracking_uri and job.state in ("failed", "killed", "timed out"):
                mark_ended(self.sweep.tracking_uri, job.mlflow_run_id, "FAILED" if job.state == "failed" else "KILLED")
        before = [job.mlflow_run_id for job in self.jobs if job.before and job.mlflow_run_id]
        if before and self.sweep.tracking_uri:
            set_tags(self.sweep.tracking_uri, before, self.sweep.tags())
        with self._lock:
            self._record()

    def _record(self) -> None:
        """Writes the sweep down, under a lock. A full disk costs the file, not the other jobs and the table."""
        try:
            self.sweep.write(self.directory, self.jobs)
        except OSError as error:
            print(f"xpo: {self.directory}/sweep.json cannot be written ({error.strerror})", file=sys.stderr)


def _runs_by_key(roots: Sequence[Path]) -> dict[str, list[Path]]:
    """Run directories by the job key of their runs, the newest first."""
    runs: dict[str, list[Path]] = {}
    for run_dir, record in all_runs(roots):
        if not record.mixed:
            runs.setdefault(record.job_key, []).append(run_dir)
    return runs


def _without_run(run_dir: Path) -> Path:
    """The directory, or RUN_DIR-2 and so on if it holds a run: a sweep's directory may be used for more values."""
    numbered = (run_dir.with_name(f"{run_dir.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([run_dir], numbered) if not (free / "run.json").exists())
