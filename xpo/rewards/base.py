"""What a reward model is: something that scores one completion of a prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from xpo.data.prompts import Prompt


class Scores(NamedTuple):
    """What a reward model says of B completions.

    Attributes:
        total: the rewards, (B,); see `RewardModel.scores`.
        parts: what they are made of, by name, (B,) each; empty unless the model is a mix.
    """

    total: Tensor
    parts: dict[str, Tensor]


class RewardModel(ABC):
    """Scores completions. A reward model of your own needs `scores` only.

    Renders text with its own chat template and tokenizer, if it has any.
    """

    @abstractmethod
    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Rewards of completions.

        Args:
            prompts: B prompts, strings or message lists.
            completions: B decoded completions without special tokens.

        Returns:
            Float tensor (B,) on the CPU: higher is better, NaN where there is no score.
        """

    def scores_with_parts(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """The scores, and what they are made of."""
        return Scores(self.scores(prompts, completions), {})

    @property
    def fingerprint(self) -> str | None:
        """Names what the scores depend on besides the texts: weights (not their name) and settings.

        Two models with the same fingerprint share cached scores. None: its scores are never cached.
        """
        return None
