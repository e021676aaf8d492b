"""What a judge is: something that compares two completions of the same prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xpo.data.prompts import Prompt
from xpo.rewards.base import Scores


class Verdicts(NamedTuple):
    """What a judge says of B pairs.

    Attributes:
        margin: log-odds that the first completion beats the second; see `Judge.margins`, (B,).
        flipped: 1 where the verdict changed with the order of the completions, 0 where both orders agreed, NaN
            where they were not both asked, (B,).
        scores: of the first and of the second completions, where the margin is their difference.
    """

    margin: Tensor
    flipped: Tensor
    scores: tuple[Scores, Scores] | None = None


class Judge(ABC):
    """Compares pairs of completions. A judge of your own needs `margins` only.

    Texts are decoded completions without special tokens; prompts are strings or message lists. A
    judge renders them with its own chat template and tokenizer, if it has any.
    """

    @abstractmethod
    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Log-odds that `first` beats `second`.

        Args:
            prompts: B prompts.
            first: B completions of them.
            second: B other completions of them.

        Returns:
            Float tensor (B,) on the CPU: positive where `first` is better, 0 for a tie, NaN where
            the judge could not tell. Swapping `first` and `second` flips the sign.

        Raises:
            JudgeStopped: the judge cannot go on at all; training stops with a checkpoint.
        """

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """The margins, and where the verdict depends on the order of the completions, if that is known."""
        margin = self.margins(prompts, first, second)
        return Verdicts(margin, torch.full_like(margin, torch.nan))

    @property
    def fingerprint(self) -> str | None:
        """Names what the margins depend on besides the texts: weights (not their name) and settings.

        Two judges with the same fingerprint share cached verdicts. None: its verdicts are never cached.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the judge, as JSON: an LLM judge's requests so far, say."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  # most judges have no state
        """Goes on from what `state` returned. The default has nothing to go on from."""
