"""Exploratory Preference Optimization (arXiv 2405.21046): a trainer and what it needs.

Names are imported at first use: `python -m xpo.train --cfg job` must not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpo.config.errors import ConfigError
    from xpo.judges import Judge, PairRMJudge, RewardJudge
    from xpo.rewards import ClassifierReward, EmbeddedReward, RewardModel
    from xpo.training.config import XPOConfig
    from xpo.training.trainer import XPOTrainer

__all__ = [
    "ClassifierReward",
    "ConfigError",
    "EmbeddedReward",
    "Judge",
    "PairRMJudge",
    "RewardJudge",
    "RewardModel",
    "XPOConfig",
    "XPOTrainer",
]

_HOME = {
    "XPOConfig": "xpo.training.config",
    "XPOTrainer": "xpo.training.trainer",
    "ConfigError": "xpo.config.errors",
    "Judge": "xpo.judges",
    "PairRMJudge": "xpo.judges",
    "RewardJudge": "xpo.judges",
    "RewardModel": "xpo.rewards",
    "ClassifierReward": "xpo.rewards",
    "EmbeddedReward": "xpo.rewards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
