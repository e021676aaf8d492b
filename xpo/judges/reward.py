"""A reward model as judge."""

from collections.abc import Sequence

from torch import Tensor

from xpo.data.prompts import Prompt
from xpo.judges.base import Judge
from xpo.models.fingerprints import digest
from xpo.rewards.base import RewardModel


class RewardJudge(Judge):
    """Prefers the completion with the higher reward: the margin is the difference of the scores.

    That is the log-odds of the Bradley-Terry model with these rewards.
    """

    def __init__(self, reward_model: RewardModel):
        self.reward_model = reward_model

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.reward_model.scores(prompts, first) - self.reward_model.scores(prompts, second)

    @property
    def fingerprint(self) -> str | None:
        scores = self.reward_model.fingerprint
        return scores and digest("difference", scores)
