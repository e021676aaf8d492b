"""A Python function as reward model."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xpo.data.prompts import Prompt
from xpo.rewards.base import RewardModel
from xpo.rewards.functions import numbers, resolve


class FunctionReward(RewardModel):
    """Scores with `function(prompts, completions)`, which returns B numbers; None stands for no score.

    Args:
        function: it, or its name as "package.module:function".

    Raises:
        ConfigError: there is no function of this name.
    """

    def __init__(self, function: Callable[..., Any] | str):
        self.function = resolve("reward_model.function", function)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return numbers(self.function(prompts, completions))
