"""What a sweep knows of its jobs: the content of SWEEP_DIR/sweep.json. Layer 0: no torch."""

import json
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xpo.config.files import write_whole
from xpo.config.schema import TrainSchema
from xpo.tracking.mlflow_client import tracking_uri

ABBREVIATIONS = {"alpha": "a", "beta": "b", "missing_eos_penalty": "e", "seed": "s", "learning_rate": "lr"}
COLORS = (  # of a job's curves in MLflow: of Okabe and Ito, then darker ones: told apart by the colour-blind too
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#004C7A", "#8F3E00", "#00604A", "#8A4A6E", "#9A6A00", "#2C6F96"),
)
DONE = "finished"
ELSEWHERE = "running elsewhere"


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
        write_whole(directory / "sweep.json", json.dumps(asdict(self), indent=1))

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
    here = directory / "sweep.json"
    ours = {job.job_key for job in jobs}
    if here.exists():  # an earlier batch, or the same command in the same directory
        before = json.loads(here.read_text())
        sweep.jobs = [Job(**job) for job in before["jobs"] if job["job_key"] not in ours] + jobs
        sweep.keys = list(dict.fromkeys([*before["keys"], *keys]))
        sweep.name = config.sweep.name or before["name"]
    elif config.sweep.name is None:
        for file in sorted(Path("multirun").rglob("sweep.json"), key=lambda file: file.stat().st_mtime, reverse=True):
            before = json.loads(file.read_text())
            if {job["job_key"] for job in before["jobs"]} == ours:
                sweep.name = before["name"]
                break
    return sweep


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
