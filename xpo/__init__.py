"""Exploratory Preference Optimization (arXiv 2405.21046): a trainer and what it needs.

Names are imported at first use: `python -m xpo.train --cfg job` must not wait for torch.
"""

from typing import TYPE_CHECKING

from xpo.config.lazy import at_first_use

if TYPE_CHECKING:
    from xpo.config.errors import ConfigError
    from xpo.judges import Judge, PairRMJudge, RewardJudge
    from xpo.rewards import ClassifierReward, EmbeddedReward, RewardModel
    from xpo.training.callbacks import LogCompletionsCallback
    from xpo.training.config import XPOConfig
    from xpo.training.trainer import XPOTrainer

_HOMES = {
    "xpo.config.errors": ("ConfigError",),
    "xpo.judges": ("Judge", "PairRMJudge", "RewardJudge"),
    "xpo.rewards": ("ClassifierReward", "EmbeddedReward", "RewardModel"),
    "xpo.training.callbacks": ("LogCompletionsCallback",),
    "xpo.training.config": ("XPOConfig",),
    "xpo.training.trainer": ("XPOTrainer",),
}
__all__ = [name for names in _HOMES.values() for name in names]
__getattr__ = at_first_use(__name__, _HOMES)
