"""A Python function as judge."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt
from xpo.judges.base import Judge
from xpo.rewards.function import UserFunction


class FunctionJudge(Judge):
    """Judges with a function of prompts, first and second, which returns B margins; None: could not tell.

    One with the parameters `first` and `second` is called by name, and given the columns of the data set that it names;
    any other by position. `function` may be a name, "package.module:function". ConfigError if there is none of this
    name, or its parameters are not those of a judge.
    """

    def __init__(self, function: Callable[..., Any] | str):
        self.function = UserFunction("judge.function", function, ("prompts", "first", "second"))

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.function(prompts, first, second)

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        self.function.check_columns(key, dataset.column_names)
