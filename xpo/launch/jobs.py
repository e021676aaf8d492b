"""From a composed configuration to a run directory that is ready to train. Layer 0: no torch."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from xpo.config.compose import CONF, checked
from xpo.config.errors import ConfigError, RunInUse, first_line
from xpo.config.schema import default_of, flatten, may_change, to_dict
from xpo.tracking.runs import ROOTS, RunRecord, job_key, resolve_resume

_KEPT = ("hydra.searchpath", "hydra.job.env_set")  # of Hydra's own words: what a run reads of them


def prepare(
    config: DictConfig,
    output_dir: Path,
    choices: dict[str, str],
    overrides: list[str],
    name: str | None = None,
    tags: dict[str, str] | None = None,
    found: tuple[Path, Path | None] | None = None,
) -> Path:
    """Checks a composed configuration and writes it to the run directory, which is returned.

    Args:
        config: composed by Hydra.
        output_dir: of a run that starts; one that goes on stays in its own.
        choices: the option of each group.
        overrides: the words of the command line.
        name: of the run; None makes one of the overrides.
        tags: for MLflow.
        found: the directory of a run to go on with, and its checkpoint if there is one; `training.resume` wins.

    Raises:
        ConfigError: a value is out of range, a required one is missing, or there is nothing to resume.
        RunInUse: another process is at work in the run directory.

    A repeated command with training.resume=auto finds its directory as it was, if its run has finished.
    """
    schema = checked(config)
    resolved = to_dict(schema)
    key = job_key(resolved)
    record = RunRecord(
        name=name or run_name(choices, overrides),
        job_key=key,
        version=importlib.metadata.version("xpo"),
        choices={group: choice for group, choice in choices.items() if "/" not in group},
        overrides=[override for override in overrides if "training.resume=" not in override],
        tags=tags or {},
    )
    if schema.training.resume is not None:
        found = resolve_resume(schema.training.resume, key, [*ROOTS, output_dir])
        if found is None:
            if schema.training.resume == "auto" and (output_dir / "run.json").exists():
                before = RunRecord.read(output_dir)
                if before.finished and before.job_key == key:
                    return output_dir  # its worker says so
            print("xpo: nothing to resume, starting from the beginning", file=sys.stderr)
    if found is not None:
        resumed, checkpoint = found[0].absolute(), found[1] and found[1].absolute()
        if schema.training.resume is not None and checkpoint is None:
            print(f"xpo: {found[0]} has no checkpoint, starting from the beginning", file=sys.stderr)
        before = RunRecord.read(resumed)
        record.mixed = before.mixed or before.job_key != key
        if not compare_with_run(resolved, resumed):  # other settings are another curve
            record.mlflow_run_id = before.mlflow_run_id
            if tags is None:  # the job of a sweep stays one
                record.name, record.tags = before.name, before.tags
        record.resume_from = str(checkpoint) if checkpoint else None
        if output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()  # Hydra's directory for this command, of no use
        output_dir = resumed
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output_dir / "run.lock", timeout=0):
            if found is None and (output_dir / "run.json").exists():
                raise ConfigError(
                    f"hydra.run.dir={str(output_dir)!r} holds a run already; "
                    f"choose another hydra.run.dir, or go on with that run: training.resume={output_dir}"
                )
            for left in ("failure.json", "worker.pid"):  # by the process that the run was before
                (output_dir / left).unlink(missing_ok=True)
            OmegaConf.save(OmegaConf.create(resolved), output_dir / "config.yaml")
            record.write(output_dir)
    except Timeout:
        raise RunInUse(output_dir) from None
    return output_dir


def repeatable(hydra_config: Any) -> list[str]:
    """The words that a command needs to compose the same configuration again."""
    flags = {"main": "--config-path", "command-line": "--config-dir"}
    sources = [(flags.get(one.provider), one.path) for one in hydra_config.runtime.config_sources]
    places = [f"{flag}={path}" for flag, path in sources if flag and path != str(CONF)]
    if hydra_config.job.config_name != "train":
        places.append(f"--config-name={hydra_config.job.config_name}")
    kept = [word for word in hydra_config.overrides.hydra if word.lstrip("+").startswith(_KEPT)]
    return [*places, *hydra_config.overrides.task, *kept]


def compare_with_run(config: dict[str, Any], run_dir: Path) -> bool:
    """Whether the configuration changes the numbers of a run that goes on, which it says; ConfigError for its model."""
    changed = False
    try:
        trained = flatten(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))  # type: ignore[arg-type]
        if not trained:
            raise ValueError("it is empty")
    except (OSError, ValueError, AttributeError, YAMLError) as error:
        record = RunRecord.read(run_dir)
        if record.job_key == job_key(config):
            return False
        raise ConfigError(
            f"training.resume={str(run_dir)!r}: its config.yaml cannot be read ({first_line(error)}), and this command "
            f"has other settings; give that run's command: {record.command(run_dir)}"
        ) from error
    given = flatten(config)
    for key in dict.fromkeys([*given, *trained]):
        value, before = given.get(key), trained.get(key, default_of(key))  # the run may be older than the key
        if before == value or may_change(key):
            continue
        if key.startswith(("model.", "lora.")):
            raise ConfigError(
                f"training.resume={str(run_dir)!r} is a run with {key}={before!r}, not {value!r}; "
                f"give that run's command: {RunRecord.read(run_dir).command(run_dir)}"
            )
        print(f"xpo: the run goes on with {key}={value!r} instead of {before!r}", file=sys.stderr)
        changed = True
    return changed


def run_name(choices: dict[str, str], overrides: list[str]) -> str:
    """A short name: the overrides by their last word, or the experiment. The MLflow UI cuts long names."""
    words = []
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if not key.startswith(("-", "experiment", "tracking", "launch", "hydra", "training.resume")):
            words.append(key.rpartition(".")[2] + equals + value)
    return " ".join(words) or choices.get("experiment", "run")
