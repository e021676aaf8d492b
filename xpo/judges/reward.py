"""A reward model as judge."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt
from xpo.judges.base import Judge, Verdicts
from xpo.models.fingerprints import digest
from xpo.rewards.base import RewardModel


class RewardJudge(Judge):
    """The margin is the difference of the scores: the log-odds of the Bradley-Terry model with these rewards."""

    def __init__(self, reward_model: RewardModel):
        self.reward_model = reward_model

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        one, two = (self.reward_model.scores_with_parts(prompts, texts).total for texts in (first, second))
        return one - two

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """The margins with the scores that they are the differences of; a subclass may have margins of its own."""
        if type(self) is not RewardJudge:
            return super().verdicts(prompts, first, second)
        one, two = (self.reward_model.scores_with_parts(prompts, texts) for texts in (first, second))
        margin = one.total - two.total
        return Verdicts(margin, torch.full_like(margin, torch.nan), (one, two))

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        self.reward_model.check_data(key, dataset)

    @property
    def fingerprint(self) -> str | None:
        scores = self.reward_model.fingerprint
        return scores and digest("difference", scores)
