"""What a sweep says on the terminal. Layer 0: no torch."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xpo.launch.sweep_record import DONE, ELSEWHERE, Job, Sweep
from xpo.tracking.mlflow_ui import chart_link, save_view
from xpo.tracking.runs import RunRecord

STATES = {DONE: "green", "stopped": "yellow", ELSEWHERE: "yellow", "not started": "yellow"}


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
        self.console.print(self._table())
        for job in self.sweep.jobs:
            if job.reason:
                self._line(f"{escape(job.name)}: {job.state}: {escape(job.reason)}")
        here = self.directory.is_relative_to(Path.cwd())
        as_typed = self.directory.relative_to(Path.cwd()) if here else self.directory
        self._line(f"Compare: python -m xpo.compare {shlex.quote(str(as_typed))}")
        self._where_in_mlflow()
        if any(job.state != DONE for job in self.sweep.jobs):
            self._line("Repeat the command to finish the rest.")

    def _table(self) -> Table:
        jobs = self.sweep.jobs
        names = [name for name in ("win_rate", "score", "kl") if any(name in job.metrics for job in jobs)]
        table = Table(title=f"Sweep {self.sweep.name}", title_justify="left")
        for title in ("job", "state"):
            table.add_column(title)
        for title in (*(name.replace("_", " ") for name in names), "minutes"):
            table.add_column(title, justify="right")
        for job in jobs:
            values = [f"{job.metrics[name]:.3f}" if name in job.metrics else "" for name in names]
            state = f"[{STATES.get(job.state, 'red')}]{job.state}[/]" + (" before" if job.before else "")
            table.add_row(escape(job.name), state, *values, f"{job.seconds / 60:.1f}" if job.seconds else "")
        return table

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
        self.console.print(text, soft_wrap=True)
