"""A Python function as reward model; and how judges find theirs."""

import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.rewards.base import RewardModel


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


def resolve(key: str, function: Callable[..., Any] | str) -> Callable[..., Any]:
    """`function`, or what it names as "package.module:function", in the current directory too; else ConfigError."""
    if not isinstance(function, str):
        return function
    remedy = f"name a function that Python can import, as in {key}=package.module:function"
    if ":" not in function:
        raise ConfigError(f"{key}={function!r} has no colon; {remedy}")
    if "" not in sys.path:
        sys.path.append("")
    try:
        found = pkgutil.resolve_name(function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={function!r} cannot be imported ({error}); {remedy}") from error
    if not callable(found):
        raise ConfigError(f"{key}={function!r} is a {type(found).__name__} and cannot be called; {remedy}")
    return found


def numbers(values: Sequence[float | None] | Tensor) -> Tensor:
    """What such a function returns, as float32 (B,) on the CPU; None becomes NaN."""
    if isinstance(values, Tensor):
        return values.float().cpu()
    return torch.tensor([float("nan") if value is None else float(value) for value in values])
