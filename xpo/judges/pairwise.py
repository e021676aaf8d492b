"""Judges that read both completions side by side, and may favour a position."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from xpo.data.prompts import Prompt, coin
from xpo.judges.base import JudgeByVerdicts, Verdicts
from xpo.rewards.base import one_per_pair


class PairwiseJudge(JudgeByVerdicts):
    """A judge whose answer may depend on which completion is shown first. Subclasses write `preferences`.

    Args:
        both_orders: show each pair in both orders, for the mean of both answers. False: in a random one, at half the
            cost; a swap still flips the sign, but the position bias stays.
        seed: fixes the random order, together with the texts.
    """

    def __init__(self, both_orders: bool = True, seed: int = 0):
        self.both_orders = both_orders
        self.seed = seed

    @abstractmethod
    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Log-odds that the completion shown first is better, float32 (B,) on the CPU; NaN: could not tell."""

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Identical completions are a tie and are not asked; a pair is invalid if an answer is missing."""
        margin, flipped = torch.zeros(len(prompts)), torch.full((len(prompts),), torch.nan)
        asked = [i for i in range(len(prompts)) if first[i] != second[i]]
        if not asked:
            return Verdicts(margin, flipped)
        x = [prompts[i] for i in asked]
        a, b = ([completions[i] for i in asked] for completions in (first, second))
        if self.both_orders:
            answers = one_per_pair("judge", self.preferences([*x, *x], [*a, *b], [*b, *a]), [*x, *x])
            forward, backward = torch.where(answers.isfinite(), answers, torch.nan).view(2, -1)
            margin[asked] = (forward - backward) / 2
            flipped[asked] = torch.where(margin[asked].isnan(), torch.nan, (forward * backward > 0).float())
        else:
            swap = [coin(self.seed, *pair) for pair in zip(x, a, b, strict=True)]
            shown = [(two, one) if s else (one, two) for one, two, s in zip(a, b, swap, strict=True)]
            answers = self.preferences(x, [one for one, _ in shown], [two for _, two in shown])
            answers = one_per_pair("judge", answers, x)
            sign = torch.where(torch.tensor(swap), -1.0, 1.0)
            margin[asked] = torch.where(answers.isfinite(), answers, torch.nan) * sign
        return Verdicts(margin, flipped)
