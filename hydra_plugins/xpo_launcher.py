"""Hydra's launcher of sweeps, which hands the jobs to `xpo.sweep`. Hydra finds its plugins in this namespace only."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class XPOLauncherConfig:
    """`hydra/launcher=xpo`, the default."""

    _target_: str = "hydra_plugins.xpo_launcher.XPOLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="xpo", node=XPOLauncherConfig, provider="xpo")


class XPOLauncher(Launcher):
    """Runs every job in processes of its own; see `xpo.sweep`. What a job returns to the sweeper is its win rate."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from xpo import sweep  # Hydra imports its plugins at every start

        jobs = sweep.run(self._compose, job_overrides, initial_job_idx)
        per_point = len(jobs) // len(job_overrides)
        rates = [job.metrics.get("win_rate", float("nan")) for job in jobs]
        points = [rates[i : i + per_point] for i in range(0, len(rates), per_point)]
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=sum(point) / per_point) for point in points]

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return config
