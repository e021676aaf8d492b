"""Reward models: how good a single completion is. One file per kind.

Nothing here knows of a second completion: that is a judge's matter.
"""

from xpo.rewards.base import RewardModel, Scores
from xpo.rewards.cached import CachedReward
from xpo.rewards.classifier import ClassifierReward
from xpo.rewards.embedded import EmbeddedReward
from xpo.rewards.function import FunctionReward
from xpo.rewards.mix import MixReward
from xpo.rewards.vader import VaderReward
