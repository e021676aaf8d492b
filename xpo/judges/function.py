"""A Python function as judge."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xpo.judges.base import Judge
from xpo.prompts import Prompt


class FunctionJudge(Judge):
    """Judges with `function(prompts, first, second)`, which returns B margins; None: could not tell."""

    def __init__(
        self,
        function: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Sequence[float | None] | Tensor],
    ):
        self.function = function

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        margins = self.function(prompts, first, second)
        if isinstance(margins, Tensor):
            return margins.float().cpu()
        return torch.tensor([float("nan") if margin is None else float(margin) for margin in margins])
