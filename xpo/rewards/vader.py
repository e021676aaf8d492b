"""A sentiment lexicon as a reward: the independent check of a policy trained on another reward."""

import importlib.metadata
from collections.abc import Sequence

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.rewards.base import RewardModel


class VaderReward(RewardModel):
    """VADER's compound score of a completion alone, in [-1, 1]; 0 without a word of the lexicon.

    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.

    Raises:
        ConfigError: the package vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError as error:
            raise ConfigError(
                "VaderReward needs the package vaderSentiment, which is not installed: "
                "pip install vaderSentiment==3.3.2"
            ) from error
        self.analyzer = SentimentIntensityAnalyzer()

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        compound = [self.analyzer.polarity_scores(completion)["compound"] for completion in completions]
        return torch.tensor(compound, dtype=torch.float32)

    @property
    def fingerprint(self) -> str:
        return f"VADER {importlib.metadata.version('vaderSentiment')}"
