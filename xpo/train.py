"""`python -m xpo.train`: the Hydra entry point.

Composes and checks the configuration, then starts one worker process per job and waits for it. The parent never imports
torch: jobs of a sweep cannot disturb each other, and `--cfg job` answers at once. Started by torchrun or
`accelerate launch`, where RANK is set, the process is a worker itself.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from xpo.config.compose import CONF, check_hydra, checked, choose_preset, compose
from xpo.config.errors import ConfigError, JobFailed
from xpo.config.schema import to_dict
from xpo.launch.command import exit_status, print_error, run_composed
from xpo.launch.jobs import prepare, repeatable
from xpo.launch.processes import JobProcess, exit_statuses, passing_on_signals, signals
from xpo.tracking.runs import RunRecord, job_key, last_evaluation, resumable_checkpoint


def main() -> None:
    """The command line: `python -m xpo.train [-m] [key=value ...]`. Exit status 2 for bad input."""
    sys.argv[1:] = choose_preset(sys.argv[1:])
    run_composed(_work_as_rank if "RANK" in os.environ else _parent)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _parent(config: DictConfig) -> float | None:
    """One job, not of a sweep, or started by another launcher than ours; returns its win rate, for a sweeper.

    If it is part of a sweep, what went wrong is raised: the command may be another process, which would not know.
    """
    if signals:
        return None
    hydra_config = HydraConfig.get()
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    if in_sweep and config.sweep.seeds != 1:  # our own launcher does not call this
        raise ConfigError(
            f"sweep.seeds={config.sweep.seeds} needs hydra/launcher=xpo; with this launcher sweep training.seed=1,2,3"
        )
    run_dir = Path(hydra_config.runtime.output_dir)
    try:
        check_hydra()
        check_seeds(config)
        # Reading the overrides resolves an interpolation in them, which may fail.
        choices, overrides = dict(hydra_config.runtime.choices), repeatable(hydra_config)
        begun = begun_before(config, run_dir) if in_sweep else None
        if begun is None or not begun.finished:
            found = None if begun is None else (run_dir, resumable_checkpoint(run_dir))
            run_dir = prepare(config, run_dir, choices, overrides, found=found)
    except Exception as error:  # Hydra would print a line of its own
        if in_sweep:
            raise
        exit_statuses.append(exit_status(error))
        return None
    status = start_worker(run_dir)
    if in_sweep and status:
        raise JobFailed(f"the job in {run_dir} came to nothing (exit status {status}); the others have run")
    exit_statuses.append(status)
    return last_evaluation(run_dir).get("win_rate")


def begun_before(config: DictConfig, run_dir: Path) -> RunRecord | None:
    """The record of this job's run, if there is one: submitit starts a job anew after a timeout."""
    if not (run_dir / "run.json").exists():
        return None
    record = RunRecord.read(run_dir)
    return record if record.job_key == job_key(to_dict(checked(config))) else None


def check_seeds(config: DictConfig) -> None:
    """ConfigError for several seeds of one run."""
    alone = "hydra.mode=RUN" in sys.argv  # a job of a sweep that goes on alone
    if config.sweep.seeds != 1 and HydraConfig.get().mode != RunMode.MULTIRUN and not alone:
        raise ConfigError(f"sweep.seeds={config.sweep.seeds} is for sweeps; add -m, or leave it out")


def start_worker(run_dir: Path) -> int:
    """Runs one job to its end and returns its exit status; SIGINT and SIGTERM go to the job."""
    job = JobProcess(run_dir)
    with passing_on_signals(job.stop):
        outcome = job.wait()
    if outcome.state in ("killed", "timed out"):
        words = RunRecord.read(run_dir).command(run_dir)
        print_error(f"the worker of {run_dir} was {outcome.state} ({outcome.reason}); continue with: {words}")
    return outcome.status


def _work_as_rank() -> None:
    """This process is one rank of a group that the user's launcher started."""
    no_sweeps = ConfigError(
        "--multirun under a launcher is not supported; start the sweep without torchrun or accelerate"
    )
    if {"-m", "--multirun"}.intersection(sys.argv):
        raise no_sweeps
    config, run_dir, choices = compose(sys.argv[1:])
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:  # a file says so
        raise no_sweeps
    check_seeds(config)
    with env_override(dict(hydra_config.job.env_set)):
        if os.environ["RANK"] == "0":
            run_dir = prepare(config, run_dir, choices, repeatable(hydra_config))
        from xpo.launch import worker

        exit_statuses.append(worker.run(OmegaConf.to_object(config), run_dir))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
