"""Scores remembered on disk."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt
from xpo.data.remembered import Remembered
from xpo.rewards.base import RewardModel


class CachedReward(RewardModel):
    """Scores each completion once; all scores but NaN are kept in a file that epochs, resumes and jobs share.

    `path` and `commit_every` are those of `xpo.data.remembered.Remembered`; ConfigError for a reward model without a
    fingerprint.
    """

    def __init__(self, reward_model: RewardModel, path: Path | str, commit_every: int = 1024):
        self.reward_model = reward_model
        self._scores = Remembered("score", "f", reward_model, "reward model", path, commit_every)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        texts = list(zip(prompts, completions, strict=True))
        return self._scores.columns(texts, lambda *columns: self.reward_model.scores_with_parts(*columns)[:1])[0]

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        self.reward_model.check_data(key, dataset)

    @property
    def fingerprint(self) -> str:
        return self._scores.fingerprint
