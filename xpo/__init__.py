"""Exploratory Preference Optimization (arXiv 2405.21046): a trainer and what it needs.

Names are imported at first use: `python -m xpo.train --cfg job` must not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpo.config.errors import ConfigError
    from xpo.judges import Judge, PairRMJudge, RewardJudge
    from xpo.rewards import ClassifierReward, EmbeddedReward, RewardModel
    from xpo.training.callbacks import LogCompletionsCallback
    from xpo.training.config import XPOConfig
    from xpo.training.trainer import XPOTrainer

__all__ = [
    "ClassifierReward",
    "ConfigError",
    "EmbeddedReward",
    "Judge",
    "LogCompletionsCallback",
    "PairRMJudge",
    "RewardJudge",
    "RewardModel",
    "XPOConfig",
    "XPOTrainer",
]

_HOMES = {
    "xpo.config.errors": ("ConfigError",),
    "xpo.judges": ("Judge", "PairRMJudge", "RewardJudge"),
    "xpo.rewards": ("ClassifierReward", "EmbeddedReward", "RewardModel"),
    "xpo.training.callbacks": ("LogCompletionsCallback",),
    "xpo.training.config": ("XPOConfig",),
    "xpo.training.trainer": ("XPOTrainer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'xpo' has no attribute {name!r}")
