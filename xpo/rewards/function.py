"""A Python function as reward model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xpo.prompts import Prompt
from xpo.rewards.base import RewardModel


class FunctionReward(RewardModel):
    """Scores with `function(prompts, completions)`, which returns B numbers; None stands for no score."""

    def __init__(self, function: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None] | Tensor]):
        self.function = function

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        scores = self.function(prompts, completions)
        if isinstance(scores, Tensor):
            return scores.float().cpu()
        return torch.tensor([float("nan") if score is None else float(score) for score in scores])
