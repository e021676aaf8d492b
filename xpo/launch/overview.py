"""The runs and sweeps of a directory: what became of each, what it has measured, how it goes on. No torch."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xpo.config.errors import ConfigError, printable
from xpo.config.files import jobs_of
from xpo.launch.sweep_record import DONE, STATES, Sweep
from xpo.tracking.metrics_log import evaluations, read_metrics
from xpo.tracking.runs import RunRecord, all_runs, state_of

_MEASURES = ("win_rate", "score", "kl")
_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


@dataclass
class RunState:
    """A run as a table shows it."""

    run: str  # its directory
    name: str
    sweep: str | None  # the name of the sweep that it is a job of
    state: str
    reason: str | None  # why it failed
    step: int | None  # the last that was logged
    win_rate: float | None  # of the last evaluation, as the next two
    score: float | None
    kl: float | None
    seconds: float  # since its files have changed
    bytes: int  # on the disk
    resume: str | None  # the command that goes on with it, if it has not finished


@dataclass
class SweepState:
    """A sweep as `xpo.compare` will find it."""

    sweep: str  # its directory
    name: str
    jobs: int
    finished: int


def runs_below(roots: Iterable[Path]) -> list[RunState]:
    """Every run below some directories, the newest first; of what cannot be read there is a warning."""
    return [_state(_as_typed(run_dir), record) for run_dir, record in all_runs(roots)]


def _state(run_dir: Path, record: RunRecord) -> RunState:
    state, reason = state_of(run_dir, record)
    try:
        log = read_metrics(run_dir)
    except ConfigError as error:
        log, state, reason = [], "damaged", str(error)
    measured = next(reversed(evaluations(log)), {})
    files = [path.stat() for path in run_dir.rglob("*") if path.is_file()]
    return RunState(
        run=str(run_dir),
        name=record.name,
        sweep=record.tags.get("xpo.sweep"),
        state=state,
        reason=reason,
        step=int(log[-1]["step"]) if log else None,
        **{name: measured.get(f"eval_{name}") for name in _MEASURES},
        seconds=time.time() - max(file.st_mtime for file in files),
        bytes=sum(file.st_size for file in files),
        resume=None if state in (DONE, "running") else record.command(run_dir),
    )


def sweeps_below(roots: Iterable[Path]) -> list[SweepState]:
    """Every sweep below some directories, the newest first."""
    files = {file.resolve() for root in roots for file in root.rglob("sweep.json")}
    found = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        sweep = Sweep.read(file.parent)
        if sweep is not None:
            # A job may have gone on alone.
            finished = sum(_has_finished(run_dir, job["state"]) for job, run_dir in jobs_of(file.parent))
            found.append(SweepState(str(_as_typed(file.parent)), sweep.name, len(sweep.jobs), finished))
    return found


def _has_finished(run_dir: Path, state: str) -> bool:
    if not (run_dir / "run.json").is_file():
        return state == DONE
    record = RunRecord.read(run_dir)
    return record.finished and not record.mixed


def _as_typed(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def as_json(runs: Sequence[RunState], sweeps: Sequence[SweepState]) -> str:
    """Both lists as one JSON object, with the names of the fields."""
    return json.dumps({"runs": [asdict(run) for run in runs], "sweeps": [asdict(sweep) for sweep in sweeps]}, indent=1)


def show(runs: Sequence[RunState], sweeps: Sequence[SweepState]) -> None:
    """A table of the runs, a line for each sweep, and the commands that go on."""
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True)
    table.add_column("name")  # the only one that gives way on a narrow terminal
    table.add_column("state", no_wrap=True)
    for title in ("step", "wins", "score", "KL", "age", "disk"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        measured = ["" if value is None else f"{value:.2f}" for value in (run.win_rate, run.score, run.kl)]
        state = f"[{STATES.get(run.state, 'red')}]{run.state}[/]"
        step, name = "" if run.step is None else str(run.step), printable(run.name)
        shortened = Text(name, no_wrap=True, overflow="ellipsis")
        table.add_row(escape(run.run), shortened, state, step, *measured, _age(run.seconds), _size(run.bytes))
    console.print(table)

    def line(text: str) -> None:
        console.print(escape(printable(text)), soft_wrap=True)

    for sweep in sweeps:
        counts = f"{sweep.finished} of {sweep.jobs} jobs have finished"
        line(f"Sweep {sweep.name}: {counts}. Compare: python -m xpo.compare {sweep.sweep}")
    for run in runs:
        reason = f" ({run.reason})" if run.reason else ""
        if run.resume:
            line(f"{run.run}: {run.state}{reason}. Go on: {run.resume}")


def _age(seconds: float) -> str:
    size, unit = next((one for one in _UNITS if seconds >= one[0]), _UNITS[-1])
    return f"{seconds / size:.0f}{unit}"


def _size(count: int) -> str:
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.3g}{' kMGT'[power].strip()}B"
