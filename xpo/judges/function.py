"""A Python function as judge."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xpo.data.prompts import Prompt
from xpo.judges.base import Judge
from xpo.rewards.function import numbers, resolve


class FunctionJudge(Judge):
    """Judges with `function(prompts, first, second)`, which returns B margins; None: could not tell.

    `function` may be a name, "package.module:function"; ConfigError if there is none of this name.
    """

    def __init__(self, function: Callable[..., Any] | str):
        self.function = resolve("judge.function", function)

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return numbers(self.function(prompts, first, second))
