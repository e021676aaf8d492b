"""Run directories: what lies in them, and which one a resumed command goes on with. Layer 0: no torch.

RUN_DIR/
  config.yaml            the resolved configuration
  run.json               a RunRecord
  run.lock, worker.pid   held by the worker while it runs
  completions/           one file per evaluation
  model/                 the final model with its card, and checkpoint-N/ beside it
  metrics.jsonl          everything that was logged, as it was logged
  pairs.jsonl            every labelled pair, as it was drawn; at the end pairs.parquet, a preference data set
  output.log             what the job of a sweep printed, if several ran at once
  failure.json           why it failed
  mlflow.json            where MLflow has the run; what it lacks is sent by: python -m xpo.track replay
"""

import hashlib
import json
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from xpo.config.errors import ConfigError, hydra_value, printable
from xpo.config.files import matching_files, read_object, write_whole
from xpo.config.schema import identity
from xpo.tracking.metrics_log import NAME, evaluations, read_metrics


@dataclass
class RunRecord:
    """What a run directory says of its run, besides the configuration."""

    name: str = "run"
    job_key: str = ""
    version: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    resume_from: str | None = None
    finished: bool = False
    mixed: bool = False  # it went on with other settings: no command repeats it
    tags: dict[str, str] = field(default_factory=dict)  # for MLflow

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """The record in `run_dir`; ConfigError if it is damaged."""
        return read_object(run_dir / "run.json", cls)

    def write(self, run_dir: Path) -> None:
        """Puts the record into `run_dir`, whole or not at all."""
        write_whole(run_dir / "run.json", json.dumps(asdict(self), indent=1))

    def command(self, resume: Path | str | None = None) -> str:
        """The command line of the run, or the one that goes on with it."""
        more = [] if resume is None else [f"training.resume={hydra_value(str(resume))}"]
        return shlex.join(["python", "-m", "xpo.train", *self.overrides, *more])


ROOTS = (Path("outputs"), Path("multirun"))  # where run directories are looked for


def all_runs(roots: Iterable[Path]) -> list[tuple[Path, RunRecord]]:
    """Every run directory below `roots` with its record, the newest first; of a damaged one there is a warning."""
    files = {file.resolve() for root in roots for file in root.rglob("run.json")}
    runs = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            runs.append((file.parent, RunRecord.read(file.parent)))
        except ConfigError as error:
            print(f"xpo: a run is passed over: {error}", file=sys.stderr)
    return runs


def in_use(run_dir: Path) -> bool:
    """Whether a process is at work in a run directory."""
    try:
        with FileLock(run_dir / "run.lock", timeout=0):
            return False
    except Timeout:
        return True


def state_of(run_dir: Path, record: RunRecord) -> tuple[str, str | None]:
    """What became of a run: finished, running, failed, stopped or not started; and why it failed, if it says so."""
    failure = run_dir / "failure.json"
    if record.finished:
        return "finished", None
    # A worker that starts has no worker.pid yet: looking must not take the lock away from it.
    if (run_dir / "worker.pid").exists() and in_use(run_dir):
        return "running", None
    if failure.exists():
        try:
            return "failed", read_object(failure, lambda reason, **_: str(reason))
        except ConfigError:  # a full disk takes no reason
            return "failed", None
    return ("stopped" if (run_dir / NAME).exists() else "not started"), None


def job_key(config: dict[str, Any]) -> str:
    """Names what a run computes: a hash of its identity, in which files of prompts count with their content."""
    data = config["data"]
    digests = [_digest(f"data.{part}", file) for part in ("train", "eval") for file in _files_of(data[part] or "")]
    relevant = identity(config) | {"files": digests}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _files_of(name: str) -> list[Path]:
    """The files of prompts that a name stands for: one, a pattern's, or all of a directory, hidden ones left out."""
    directory = Path(name).expanduser()
    if not name or not directory.is_dir():
        return matching_files(name)
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(directory).parts)]


def _digest(key: str, file: Path) -> str:
    """A hash of what a file of prompts holds."""
    try:
        stat = file.stat()
        return _file_digest(file, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{key}={str(file)!r} cannot be read ({error.strerror}); choose another file") from error


@cache  # all jobs of a sweep have the same ones
def _file_digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def last_evaluation(run_dir: Path) -> dict[str, float]:
    """The metrics of a finished run's last evaluation, without "eval_"."""
    evaluated = evaluations(read_metrics(run_dir)) if RunRecord.read(run_dir).finished else []
    last = evaluated[-1] if evaluated else {}
    return {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}


def last_complete_checkpoint(model_dir: Path) -> Path | None:
    """The newest checkpoint-N that is whole: a killed run may leave a half-written one. Others get a warning."""
    for _, path in sorted(_numbered(model_dir), reverse=True):
        what = damage(path)
        if what is None:
            return path
        print(f"xpo: {path} is passed over: {printable(what)}", file=sys.stderr)
    return None


def set_aside(model_dir: Path, step: int) -> list[Path]:
    """Renames the whole checkpoints behind a step, for a run that goes on from there; returns what they are called now.

    Their weights are those of another run, which the next resume would take for this one's. The underscore keeps them
    off the hub, and the new name from the Trainer's rotation.
    """
    moved = []
    for number, path in sorted(_numbered(model_dir)):
        if number > step and is_complete(path):
            aside = path.with_name(f"_abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def _numbered(model_dir: Path) -> list[tuple[int, Path]]:
    named = [(path.name.removeprefix("checkpoint-"), path) for path in model_dir.glob("checkpoint-*")]
    return [(int(number), path) for number, path in named if number.isdecimal()]  # people keep copies beside them


# Of a checkpoint: weights in each form, what else there may be, and what comes with an optimizer's state.
ITERATES = "_iterates"  # in model/: the policies that iterations began with; nothing with such a name goes to the hub
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.bin", "*/adapter_model.*", "latest")
_PARTS = ("*.safetensors", "*.index.json", "*.pt", "rng_state*.pth", "xpo_state_*.json", "global_step*/*.pt")
_WITH_OPTIMIZER = ("rng_state*.pth", "xpo_state_*.json")


def damage(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, or what of it was cut off or is no file of its kind; None if it is whole.

    Contents are not read: it takes no time, however large the model is.
    """
    state = checkpoint / "trainer_state.json"  # is written last
    if not state.is_file():
        return "trainer_state.json is missing"
    if _is_cut(state) or "global_step" not in json.loads(state.read_text()):
        return "trainer_state.json is damaged"
    if not any(True for pattern in _WEIGHTS for _ in checkpoint.glob(pattern)):
        return "the weights are missing"
    needed = [name for name in _WITH_OPTIMIZER if has_optimizer(checkpoint)]
    # The Trainer would go on without the optimizer's state, too, and say nothing.
    needed += ["scheduler.pt" for name in ("optimizer.pt", "optimizer.bin") if (checkpoint / name).exists()]
    for pattern in needed:
        if not any(checkpoint.glob(pattern)):
            return f"{pattern} is missing"
    for file in (file for pattern in _PARTS for file in checkpoint.glob(pattern)):
        if _is_cut(file):
            return f"{file.name} is damaged"
    for index in checkpoint.glob("*.index.json"):
        for name in json.loads(index.read_text())["weight_map"].values():
            if not (checkpoint / name).exists():
                return f"{name} is missing"
    return None


def _is_cut(file: Path) -> bool:
    """Whether a JSON, safetensors or PyTorch file does not reach to its end."""
    try:
        if file.suffix == ".json":
            return not isinstance(json.loads(file.read_text()), dict)
        if file.suffix != ".safetensors":
            return not zipfile.is_zipfile(file)  # whose directory is at the end
        with safe_open(file, framework="numpy"):  # which reads the header, and where it says that the last tensor ends
            return False
    except (OSError, ValueError, SafetensorError):
        return True


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole."""
    return damage(checkpoint) is None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether training can go on from a checkpoint, or only a model lies there."""
    return any((checkpoint / state).exists() for state in ("optimizer.pt", "optimizer.bin", "latest"))


def resumable_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run from which it can go on."""
    checkpoint = last_complete_checkpoint(run_dir / "model")
    return checkpoint if checkpoint is not None and has_optimizer(checkpoint) else None


def drop_training_state(run_dir: Path) -> None:
    """Leaves the checkpoints of a finished run their weights: what only training needs is two thirds of their size."""
    shutil.rmtree(run_dir / "model" / ITERATES, ignore_errors=True)
    for checkpoint in (run_dir / "model").glob("checkpoint-*"):
        for pattern in ("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "latest", "zero_to_*.py"):
            for file in checkpoint.glob(pattern):
                file.unlink()
        for parts in checkpoint.glob("global_step*"):
            shutil.rmtree(parts)


def resolve_resume(resume: str, key: str, roots: list[Path]) -> tuple[Path, Path | None] | None:
    """The run directory and the checkpoint that `training.resume` names; ConfigError if there is none at the path.

    A run that was stopped before its first checkpoint starts again, in its directory.

    Args:
        resume: a run directory; a checkpoint in one; or "auto", the newest unfinished run of the command that has a
            checkpoint, else the newest that has none, else None: the run starts from the beginning.
        key: the job key of the command, for "auto".
        roots: directories under which "auto" looks for run directories.
    """
    if resume == "auto":
        runs = [(run_dir, record) for run_dir, record in all_runs(roots) if record.job_key == key and not record.mixed]
        mine = [run_dir for run_dir, record in runs if not record.finished]
        found = [(run_dir, resumable_checkpoint(run_dir)) for run_dir in mine]
        begun = [(run_dir, checkpoint) for run_dir, checkpoint in found if checkpoint is not None]
        return next(iter(begun + found), None)
    path = Path(resume).expanduser()
    checkpoint = path if is_complete(path) else last_complete_checkpoint(path / "model")
    run_dir = path.parent.parent if checkpoint == path else path
    written = [one for one in (path, *(path / "model").glob("checkpoint-*")) if (one / "trainer_state.json").exists()]
    if checkpoint is None and (damaged := [f"{one}: {what}" for one in written if (what := damage(one))]):
        raise ConfigError(
            f"training.resume={resume!r} is damaged ({damaged[0]}); give another run or checkpoint, or start a new run"
        )
    if checkpoint is None and (run_dir / "run.json").is_file() and not RunRecord.read(run_dir).finished:
        return run_dir, None
    if checkpoint is None or not (run_dir / "run.json").is_file():
        raise ConfigError(
            f"training.resume={resume!r} holds no complete checkpoint; "
            "give a run directory (outputs/DATE/TIME), a checkpoint in its model/, or auto"
        )
    if not has_optimizer(checkpoint):
        raise ConfigError(
            f"training.resume={resume!r} has no optimizer state (training.save_only_model=true); "
            "start a new run with model.name set to the checkpoint"
        )
    return run_dir, checkpoint
