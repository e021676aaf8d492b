"""`python -m xpo.train`: the Hydra entry point.

Composes and checks the configuration, then starts one worker process per job and waits for it. The
parent never trains and never imports torch: jobs of a sweep cannot disturb each other, and
`--cfg job` answers at once. Started by torchrun or `accelerate launch`, where RANK is set, the
process is a worker itself.
"""

import importlib.metadata
import os
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from xpo.errors import ConfigError
from xpo.overrides import CONF, explain, unknown_key
from xpo.runs import OPERATION, RunRecord, job_key, resolve_resume
from xpo.schema import TrainSchema, flatten, to_dict

ConfigStore.instance().store(name="schema", node=TrainSchema)
_exit_statuses: list[int] = []
_signals: list[int] = []  # that reached this process; what is left of a sweep does not start then


def main() -> None:
    """The command line: `python -m xpo.train [-m] [key=value ...]`. Exit status 2 for bad input."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of a traceback
    sys.argv[1:] = choose_preset(sys.argv[1:])
    try:
        if "RANK" in os.environ:
            sys.exit(_work_as_rank(sys.argv[1:]))
        _parent()
    except Exception as error:
        sys.exit(_bad_input(error))
    sys.exit(max(_exit_statuses, default=0))


def choose_preset(arguments: list[str]) -> list[str]:
    """Leaves the default preset out where a model or data set is chosen: quickstart is made for its own."""
    groups = [argument.partition("=")[0] for argument in arguments]
    chosen = [groups.index(key) for key in ("model", "data", "model.name", "data.train") if key in groups]
    if not chosen or "experiment" in groups:
        return arguments
    return [*arguments[: min(chosen)], "experiment=none", *arguments[min(chosen) :]]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _parent(config: DictConfig) -> None:
    """One job: a worker process, to which signals are passed on."""
    if _signals:
        return
    hydra_config = HydraConfig.get()
    try:
        run_dir = prepare(
            config,
            Path(hydra_config.runtime.output_dir),
            dict(hydra_config.runtime.choices),
            list(hydra_config.overrides.task),
        )
    except Exception as error:  # Hydra would print a line of its own
        _exit_statuses.append(_bad_input(error))
        return
    _exit_statuses.append(start_worker(run_dir))


def _bad_input(error: Exception) -> int:
    """One line on stderr if the command line is to blame for `error`, which is raised again if not."""
    message = explain(error, CONF, sys.argv[1:])
    if message is None:
        raise error
    print(f"xpo: error: {message}", file=sys.stderr)
    return 2


def prepare(config: DictConfig, output_dir: Path, choices: dict[str, str], overrides: list[str]) -> Path:
    """Checks a composed configuration and writes it to the run directory, which is returned.

    With `training.resume` that is the directory of the run that goes on.

    Raises:
        ConfigError: a value is out of range, a required one is missing, or there is nothing to resume.
    """
    check_keys(OmegaConf.to_container(config))  # type: ignore[arg-type]
    missing = OmegaConf.missing_keys(config)
    if missing:
        key = sorted(missing)[0]
        raise ConfigError(f"{key} has no value; give one with {key}=...")
    schema: TrainSchema = OmegaConf.to_object(config)  # type: ignore[assignment]
    resolved = to_dict(schema)
    key = job_key(resolved)
    record = RunRecord(
        name=run_name(choices, overrides),
        job_key=key,
        version=importlib.metadata.version("xpo"),
        choices={group: choice for group, choice in choices.items() if "/" not in group},
        overrides=[override for override in overrides if "training.resume=" not in override],
    )
    resume = schema.training.resume
    resumed: Path | None = None
    if resume is not None:
        found = resolve_resume(resume, key, [Path("outputs"), Path("multirun"), output_dir])
        if found is not None:
            resumed, checkpoint = found[0].absolute(), found[1] and found[1].absolute()
            if not compare_with_run(resolved, resumed):  # other settings are another curve
                record.mlflow_run_id = RunRecord.read(resumed).mlflow_run_id
            record.resume_from = str(checkpoint) if checkpoint else None
            if output_dir.is_dir() and not any(output_dir.iterdir()):
                output_dir.rmdir()  # Hydra's directory for this command, of no use
            output_dir = resumed
        else:
            print("xpo: nothing to resume, starting from the beginning", file=sys.stderr)
    if resumed is None and (output_dir / "run.json").exists():
        raise ConfigError(
            f"hydra.run.dir={str(output_dir)!r} holds a run already; "
            f"choose another hydra.run.dir, or go on with that run: training.resume={output_dir}"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(resolved), output_dir / "config.yaml")
    record.write(output_dir)
    return output_dir


# What may change and leave a run the same experiment; more steps stretch a schedule that depends on them.
_HARMLESS = (
    "tracking.",
    "reference.store",
    "training.resume",
    "training.profile",
    "training.max_steps",
    "training.save_",
    "training.disable_tqdm",
)


def compare_with_run(config: dict[str, Any], run_dir: Path) -> bool:
    """Whether the configuration changes the numbers of a run that goes on, which it says.

    Raises:
        ConfigError: it changes the run's model.
    """
    changed = False
    trained = flatten(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))  # type: ignore[arg-type]
    for key, value in flatten(config).items():
        before = trained.get(key)
        operation = key.startswith("judge.") and key.rpartition(".")[2] in OPERATION
        if before == value or operation or key.startswith(_HARMLESS):
            continue
        if key.startswith(("model.", "lora.")):
            raise ConfigError(
                f"training.resume={str(run_dir)!r} is a run with {key}={before!r}, not {value!r}; "
                f"give that run's command: {RunRecord.read(run_dir).command(run_dir)}"
            )
        print(f"xpo: the run goes on with {key}={value!r} instead of {before!r}", file=sys.stderr)
        changed = True
    return changed


def check_keys(config: dict[Any, Any], schema: type = TrainSchema, prefix: str = "") -> None:
    """ConfigError for a key that the schema does not know: `+key=value` gets past Hydra's own check."""
    types = {field.name: field.type for field in fields(schema)}
    for key, value in config.items():
        if key not in types:
            raise ConfigError(unknown_key(f"{prefix}{key}", CONF))
        if is_dataclass(types[key]):
            check_keys(value, types[key], f"{prefix}{key}.")  # type: ignore[arg-type]


def run_name(choices: dict[str, str], overrides: list[str]) -> str:
    """A short name: the overrides by their last word, or the experiment. The MLflow UI cuts long names."""
    words = []
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if not key.startswith(("experiment", "tracking", "training.resume")):
            words.append(key.rpartition(".")[2] + equals + value)
    return " ".join(words) or choices.get("experiment", "run")


def start_worker(run_dir: Path) -> int:
    """Runs one worker to its end and returns its exit status; SIGINT and SIGTERM go to the worker."""
    # A session of its own: Ctrl-C in a terminal would reach the worker twice otherwise.
    worker = subprocess.Popen([sys.executable, "-m", "xpo.worker", str(run_dir)], start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        _signals.append(number)
        worker.send_signal(number)

    handlers: dict[int, Any] = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = worker.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status >= 0:
        return status
    if not _signals:
        print(
            f"xpo: error: the worker of {run_dir} was killed by {signal.Signals(-status).name}, for want of memory "
            f"perhaps; continue with: {RunRecord.read(run_dir).command('auto')}",
            file=sys.stderr,
        )
    return 128 - status


def compose(arguments: list[str]) -> tuple[DictConfig, Path, dict[str, str]]:
    """The configuration that the command line asks for, its run directory, and the option of each group."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=arguments, return_hydra_config=True)
    run_dir, choices = Path(config.hydra.run.dir), dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, run_dir, choices


def _work_as_rank(arguments: list[str]) -> int:
    """This process is one rank of a group that the user's launcher started."""
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            "--multirun under a launcher is not supported; start the sweep without torchrun or accelerate"
        )
    config, run_dir, choices = compose(arguments)
    if os.environ["RANK"] == "0":
        run_dir = prepare(config, run_dir, choices, arguments)
    from xpo import worker

    schema: TrainSchema = OmegaConf.to_object(config)  # type: ignore[assignment]
    return worker.run(schema, run_dir)


if __name__ == "__main__":
    main()
