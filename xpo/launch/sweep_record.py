"""What a sweep knows of its jobs: the content of SWEEP_DIR/sweep.json, and the terminal's view of it. No torch."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xpo.config.errors import ConfigError, printable
from xpo.config.files import read_object, write_whole
from xpo.config.schema import TrainSchema
from xpo.tracking.mlflow_client import naming, tracking_uri
from xpo.tracking.mlflow_ui import chart_link, save_view
from xpo.tracking.runs import RunRecord

ABBREVIATIONS = {"alpha": "a", "beta": "b", "missing_eos_penalty": "eos", "seed": "s", "learning_rate": "lr"}
COLORS = (  # of a job's curves in MLflow: of Okabe and Ito, then darker ones: told apart by the colour-blind too
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

    def take_in(self, directory: Path, ours: Sequence[Job]) -> None:
        """Of all jobs but `ours` an earlier batch, or another command, may have news in the file."""
        if (directory / "sweep.json").exists() and (there := Sweep.read(directory)) is not None:
            keys = {job.job_key for job in ours}
            self.jobs = [job for job in there.jobs if job.job_key not in keys] + list(ours)
            self.keys = list(dict.fromkeys([*there.keys, *self.keys]))

    def write(self, directory: Path, ours: Sequence[Job]) -> None:
        """Puts it into `directory`, whole or not at all; the caller holds a lock."""
        self.take_in(directory, ours)
        write_whole(directory / "sweep.json", json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, directory: Path) -> "Sweep | None":
        """That of `directory`; None, with a warning, if it is damaged."""

        def build(jobs: list[dict[str, Any]], **rest: Any) -> Sweep:
            return cls(jobs=[Job(**job) for job in jobs], **rest)

        try:
            return read_object(directory / "sweep.json", build)
        except ConfigError as error:
            print(f"xpo: a sweep is passed over: {error}", file=sys.stderr)
            return None

    def tags(self) -> dict[str, str]:
        """What tells the runs of a sweep apart in MLflow."""
        return {"xpo.sweep": self.name, "xpo.sweep_keys": ",".join(self.keys)}


def continued(directory: Path, jobs: list[Job], keys: list[str], config: TrainSchema) -> Sweep:
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
    there = directory if (directory / "sweep.json").exists() else earlier(jobs, config.sweep.name)
    if config.sweep.name is None and there is not None and (before := Sweep.read(there)) is not None:
        sweep.name = before.name
    return sweep


def earlier(jobs: Sequence[Job], name: str | None) -> Path | None:
    """The newest directory below multirun/ of a sweep that has the same jobs, and this name if there is one."""
    ours = {job.job_key for job in jobs}
    for file in sorted(Path("multirun").rglob("sweep.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        before = Sweep.read(file.parent)
        if before is not None and {job.job_key for job in before.jobs} == ours and name in (None, before.name):
            return file.parent.absolute()
    return None


def short_name(point: dict[str, str]) -> str:
    """A name that fits into the MLflow UI: "a1e-5 b0.1"; a value that is no number has its key's word: "loss=ipo"."""
    words = {key: key.rpartition(".")[2] for key in point}
    letters = {
        key: ABBREVIATIONS.get(word) or "".join(part[0] for part in word.split("_")) for key, word in words.items()
    }
    common = [letter for letter in letters.values() if list(letters.values()).count(letter) > 1]
    parts = []
    for key, value in point.items():
        number = _shortest(value)
        word = words[key] if letters[key] in common else letters[key]
        parts.append(f"{word}{number}" if number else f"{ABBREVIATIONS.get(words[key], words[key])}={value}")
    return " ".join(parts)


def _shortest(value: str) -> str | None:
    """A number the same way however it was typed: small ones as 1e-5, others as 0.05; None for what is none."""
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    if not number.is_finite():
        return None
    return f"{number.normalize():{'e' if 0 < abs(number) < Decimal('0.001') else 'f'}}"


class SweepReport:
    """Says what happens to the jobs of a sweep, whose sweep.json lies in `directory`."""

    def __init__(self, sweep: Sweep, directory: Path):
        self.sweep = sweep
        self.directory = directory
        self.console = Console(highlight=False)

    def announce(self, jobs: Sequence[Job], to_do: Sequence[Path]) -> None:
        """How many jobs a batch has, what became of them before, and in which run directories they start now."""
        counts = {
            "finished before": sum(job.before for job in jobs),
            "go on from a checkpoint": sum(RunRecord.read(run_dir).resume_from is not None for run_dir in to_do),
            ELSEWHERE: sum(job.state == ELSEWHERE for job in jobs),
        }
        parts = [f"{len(jobs)} jobs", *(f"{count} {what}" for what, count in counts.items() if count)]
        self._line(f"Sweep {self.sweep.name!r}: {', '.join(parts)}")

    def say(self, number: int, count: int, job: Job, what: str) -> None:
        """A line on one job."""
        self._line(f"[bold]Job {number} of {count}[/]  {escape(job.name)}  {escape(what)}")

    def summary(self) -> None:
        """A table of all jobs, and how to compare them."""
        self._show_table()
        for job in self.sweep.jobs:
            if job.reason:
                self._line(f"{escape(job.name)}: {job.state}: {escape(job.reason)}")
        here = self.directory.is_relative_to(Path.cwd())
        as_typed = self.directory.relative_to(Path.cwd()) if here else self.directory
        there = naming("--tracking-uri", self.sweep.tracking_uri) if self.sweep.tracking_uri else []
        self._line(f"Compare: {shlex.join(['python', '-m', 'xpo.compare', str(as_typed), *there])}")
        self._where_in_mlflow()
        if any(job.state != DONE for job in self.sweep.jobs):
            self._line("Repeat the command to finish the rest.")

    def _show_table(self) -> None:
        jobs = self.sweep.jobs
        names = [name for name in ("win_rate", "score", "kl") if any(name in job.metrics for job in jobs)]
        table = Table(title=f"Sweep {self.sweep.name}", title_justify="left")
        table.add_column("job")
        table.add_column("state")
        for title in (*(name.replace("_", " ") for name in names), "minutes"):
            table.add_column(title, justify="right")
        for job in jobs:
            values = [f"{job.metrics[name]:.3f}" if name in job.metrics else "" for name in names]
            state = f"[{STATES.get(job.state, 'red')}]{job.state}[/]" + (" before" if job.before else "")
            table.add_row(escape(printable(job.name)), state, *values, f"{job.seconds / 60:.1f}" if job.seconds else "")
        self.console.print(table)

    def _where_in_mlflow(self) -> None:
        uri = self.sweep.tracking_uri
        records = [RunRecord.read(Path(job.run_dir)) for job in self.sweep.jobs if job.mlflow_run_id]
        experiments = [record.mlflow_experiment_id for record in records if record.mlflow_experiment_id]
        if not uri or not experiments:
            return
        if not uri.startswith("http"):
            self._line(f"MLflow:  mlflow ui --backend-store-uri {shlex.quote(uri)}, then")
        place = (uri, experiments[0], self.sweep.name)
        self._line(f"         {chart_link(*place, save_view(*place, self.sweep.keys))}")

    def _line(self, text: str) -> None:
        self.console.print(printable(text), soft_wrap=True)
