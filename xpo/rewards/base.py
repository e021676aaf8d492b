"""What a reward model is: something that scores one completion of a prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from xpo.data.prompts import Prompt


class Scores(NamedTuple):
    """What a reward model says of B completions."""

    total: Tensor  # the rewards, (B,); see `RewardModel.scores`
    parts: dict[str, Tensor]  # what they are made of, by name, (B,) each; empty unless the model is a mix


class RewardModel(ABC):
    """Scores completions, read with its own chat template and tokenizer. One of your own needs `scores` only."""

    @abstractmethod
    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Rewards of B completions, decoded and without special tokens, of B prompts, strings or message lists.

        Returns:
            Float tensor (B,) on the CPU: higher is better, NaN where there is no score.
        """

    def scores_with_parts(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """The scores, and what they are made of."""
        return Scores(self.scores(prompts, completions), {})

    @property
    def fingerprint(self) -> str | None:
        """Names what scores depend on besides the texts: weights, not their name, and settings. None: never cached."""
        return None
