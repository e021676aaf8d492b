"""A sentiment lexicon as a reward: the independent check of a policy trained on another reward."""

import importlib
import importlib.metadata
from collections.abc import Sequence

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.rewards.base import RewardModel


class VaderReward(RewardModel):
    """VADER's compound score of a completion, in [-1, 1]; it reads the completion alone.

    A text without a word of the lexicon, the empty one included, scores exactly 0.
    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text", ICWSM 2014.

    Raises:
        ConfigError: the package vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        try:
            vader = importlib.import_module("vaderSentiment.vaderSentiment")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "VaderReward needs the package vaderSentiment, which is not installed: "
                "pip install vaderSentiment==3.3.2"
            ) from error
        self.analyzer = vader.SentimentIntensityAnalyzer()

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Float32 tensor (B,): compound scores of B completions, in [-1, 1]; prompts are not read."""
        compound = [self.analyzer.polarity_scores(completion)["compound"] for completion in completions]
        return torch.tensor(compound, dtype=torch.float32)

    @property
    def fingerprint(self) -> str:
        return f"VADER {importlib.metadata.version('vaderSentiment')}"
