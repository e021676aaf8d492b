"""Reward models: how good a single completion is. One file per kind."""

from xpo.rewards.base import RewardModel
from xpo.rewards.classifier import ClassifierReward
from xpo.rewards.embedded import EmbeddedReward
from xpo.rewards.function import FunctionReward
from xpo.rewards.vader import VaderReward

__all__ = ["ClassifierReward", "EmbeddedReward", "FunctionReward", "RewardModel", "VaderReward"]
