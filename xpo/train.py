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
from omegaconf import DictConfig, OmegaConf

from xpo.errors import ConfigError
from xpo.overrides import explain, unknown_key
from xpo.runs import RunRecord, job_key, resolve_resume
from xpo.schema import TrainSchema, to_dict

# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if path.is_dir())

ConfigStore.instance().store(name="schema", node=TrainSchema)
_exit_statuses: list[int] = []


def main() -> None:
    """The command line: `python -m xpo.train [-m] [key=value ...]`. Exit status 2 for bad input."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of a traceback
    try:
        if "RANK" in os.environ:
            sys.exit(_work_as_rank(sys.argv[1:]))
        _parent()
    except Exception as error:
        sys.exit(_bad_input(error))
    sys.exit(max(_exit_statuses, default=0))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _parent(config: DictConfig) -> None:
    """One job: a worker process, to which signals are passed on."""
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
    )
    resume = schema.training.resume
    if resume is not None:
        found = resolve_resume(resume, key, [Path("outputs"), Path("multirun")])
        if found is not None:
            resumed, checkpoint = found
            record.mlflow_run_id = RunRecord.read(resumed).mlflow_run_id
            record.resume_from = str(checkpoint)
            if output_dir.is_dir() and not any(output_dir.iterdir()):
                output_dir.rmdir()  # Hydra's directory for this command, of no use
            output_dir = resumed
        else:
            print("xpo: nothing to resume, starting from the beginning", file=sys.stderr)
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(resolved), output_dir / "config.yaml")
    record.write(output_dir)
    return output_dir


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
    words = [
        override.rpartition(".")[2]
        for override in overrides
        if not override.startswith(("experiment=", "tracking", "training.resume"))
    ]
    return " ".join(words) or choices.get("experiment", "run")


def start_worker(run_dir: Path) -> int:
    """Runs one worker to its end and returns its exit status; SIGINT and SIGTERM go to the worker."""
    # A session of its own: Ctrl-C in a terminal would reach the worker twice otherwise.
    worker = subprocess.Popen([sys.executable, "-m", "xpo.worker", str(run_dir)], start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        worker.send_signal(number)

    handlers: dict[int, Any] = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = worker.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _work_as_rank(arguments: list[str]) -> int:
    """This process is one rank of a group that the user's launcher started."""
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            "--multirun under a launcher is not supported; start the sweep without torchrun or accelerate"
        )
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=arguments, return_hydra_config=True)
    hydra_node = config.hydra
    with_hydra = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    run_dir = Path(OmegaConf.to_container(hydra_node.run, resolve=True)["dir"])  # type: ignore[index,call-overload]
    if os.environ["RANK"] == "0":
        run_dir = prepare(with_hydra, run_dir, dict(hydra_node.runtime.choices), arguments)
    from xpo import worker

    schema: TrainSchema = OmegaConf.to_object(with_hydra)  # type: ignore[assignment]
    return worker.run(schema, run_dir)


if __name__ == "__main__":
    main()
