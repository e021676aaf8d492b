"""Judges that read both completions side by side, and may favour a position."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from xpo.data.prompts import Prompt, coin
from xpo.judges.base import Judge, Verdicts


class PairwiseJudge(Judge):
    """A judge whose answer may depend on which completion is shown first. Subclasses write `preferences`.

    Args:
        both_orders: show each pair in both orders, for the mean of both answers. False shows a random one, fixed by
            `seed` and the texts: half the cost; a swap still flips the sign, but the position bias stays.
        seed: of the random order; unused with both orders.
    """

    def __init__(self, both_orders: bool = True, seed: int = 0):
        self.both_orders = both_orders
        self.seed = seed

    @abstractmethod
    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Log-odds that the completion shown first is better, float32 (B,) on the CPU; NaN: could not tell."""

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.verdicts(prompts, first, second).margin

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Identical completions are a tie and are not asked; a pair is invalid if an answer is missing."""
        margin, flipped = torch.zeros(len(prompts)), torch.full((len(prompts),), torch.nan)
        asked = [i for i in range(len(prompts)) if first[i] != second[i]]
        if not asked:
            return Verdicts(margin, flipped)
        x = [prompts[i] for i in asked]
        a, b = ([completions[i] for i in asked] for completions in (first, second))
        if self.both_orders:
            answers = self.preferences([*x, *x], [*a, *b], [*b, *a])
            forward, backward = _finite_or_nan(answers).view(2, -1)
            margin[asked] = (forward - backward) / 2
            flipped[asked] = torch.where(margin[asked].isnan(), torch.nan, (forward * backward > 0).float())
        else:
            swap = [coin(self.seed, *pair) for pair in zip(x, a, b, strict=True)]
            shown = [(two, one) if s else (one, two) for one, two, s in zip(a, b, swap, strict=True)]
            answers = self.preferences(x, [one for one, _ in shown], [two for _, two in shown])
            margin[asked] = _finite_or_nan(answers) * torch.where(torch.tensor(swap), -1.0, 1.0)
        return Verdicts(margin, flipped)


def _finite_or_nan(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan)
