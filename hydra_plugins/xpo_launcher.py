"""Hydra's launcher of sweeps, which hands the jobs to `xpo.launch.sweep`.

Hydra finds its plugins in this namespace only.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, env_override
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from xpo.config.compose import check_hydra, check_secrets
from xpo.config.errors import ConfigError


@dataclass
class XPOLauncherConfig:
    """`hydra/launcher=xpo`, the default."""

    _target_: str = "hydra_plugins.xpo_launcher.XPOLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="xpo", node=XPOLauncherConfig, provider="xpo")


class XPOLauncher(Launcher):
    """Runs every job in processes of its own; see `xpo.launch.sweep`. A job returns its win rate to the sweeper."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        check_secrets(config, resolve=False)  # before the sweeper writes multirun.yaml
        template = OmegaConf.to_container(config.hydra.sweep)["dir"]  # type: ignore[index, call-overload]
        # With a time in its name: another sweep may have begun in this second.
        new = "${now:" in template
        config.hydra.sweep.dir = str(_directory(Path(config.hydra.sweep.dir), new))
        # Of Hydra's own sweeper, where null is a single batch; others have no such key, and files of their own there.
        self.new = new and config.hydra.sweeper.get("max_batch_size", 0) is None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from xpo.launch import sweep
        from xpo.launch.processes import exit_statuses, signals

        with env_override(dict(self.config.hydra.job.env_set)):
            jobs = sweep.run(self._compose, job_overrides, initial_job_idx, self._swept(), self.new)
        if signals:  # a sweeper with more batches would go on
            sys.exit(max(exit_statuses))
        per_point = len(jobs) // len(job_overrides)
        rates = [job.metrics.get("win_rate") for job in jobs]
        points = [rates[i : i + per_point] for i in range(0, len(rates), per_point)]
        # None, not NaN: that is what Optuna's sweeper can note as a trial that failed.
        values = [None if None in point else sum(point) / per_point for point in points]
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=value) for value in values]

    def _swept(self) -> list[str]:
        """The keys that the command line or the sweeper's configuration gives ranges or choices."""
        params = self.config.hydra.sweeper.get("params") or {}
        task = OmegaConf.to_container(self.config.hydra.overrides.task)  # as typed: no job is there to resolve it
        words = [*(f"{key}={value}" for key, value in params.items()), *task]
        given = OverridesParser.create().parse_overrides(words)  # the command line comes last, and wins
        return [key for key, swept in {one.key_or_group: one.is_sweep_override() for one in given}.items() if swept]

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
            config.hydra.sweep.dir = self.config.hydra.sweep.dir
            config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute())
        HydraConfig.instance().set_config(config)
        check_hydra()
        for key in config:
            if key != "hydra":
                OmegaConf.resolve(config[key])  # now, while HydraConfig is that of this job
        return config


def _directory(wanted: Path, new: bool) -> Path:
    """Makes the directory; a `new` one is DIRECTORY-2 and so on where it exists."""
    directory, number = wanted, 1
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=not new)
            return directory
        except OSError as error:
            if not (new and directory.exists()):
                raise ConfigError(
                    f"hydra.sweep.dir={str(wanted)!r} cannot be written ({error.strerror}); choose another"
                ) from error
        number += 1
        directory = wanted.with_name(f"{wanted.name}-{number}")
