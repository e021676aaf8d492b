"""A Python function as reward model; and how functions are found and called, those of judges too."""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Batch, Prompt, as_message
from xpo.rewards.base import RewardModel, numbers

# Parameters by which a function says what it is. One that has some of them, but not all that are given, is another.
_TELLING = {"completions", "completion_ids", "first", "second", "shuffle_order", "gold_completions"}


class FunctionReward(RewardModel):
    """Scores with a function of prompts and completions, which returns B numbers; None stands for no score.

    A function with the parameter `completions` is called by name, and given what it names: `prompts`, `completions`,
    `completion_ids`, columns of the data set. With `**kwargs`, as TRL's functions have, it gets all of them, and
    completions of conversational prompts as lists of one message. Any other is called by position.

    Args:
        function: it, or its name as "package.module:function".

    Raises:
        ConfigError: there is no function of this name, or its parameters are not those of a reward.
    """

    def __init__(self, function: Callable[..., Any] | str):
        self.function = UserFunction("reward_model.function", function, ("prompts", "completions"))

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return self.function(prompts, completions)

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        self.function.check_columns(key, dataset.column_names)


class UserFunction:
    """A function that says by its parameters how it is called; see `FunctionReward` and `FunctionJudge`.

    Args:
        key: the configuration's.
        function: it, or its name.
        given: what it is called with: "prompts", and one or two lists of texts.
    """

    def __init__(self, key: str, function: Callable[..., Any] | str, given: tuple[str, ...]):
        self.function = resolve(key, function)
        self.given = given
        self.key = key if not isinstance(function, str) else f"{key}={function}"
        try:
            signature = inspect.signature(self.function)
        except (ValueError, TypeError):  # some builtins have none
            signature = inspect.signature(lambda *_: None)
        parameters = signature.parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {parameter.name for parameter in named}
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        self.by_name = self.names.issuperset(given[1:])
        needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.columns = {parameter.name for parameter in needed} - {*given, "completion_ids"} if self.by_name else set()
        fits = len(needed) == len(given) or (len(needed) < len(given) and inspect.Parameter.VAR_POSITIONAL in kinds)
        strange = not fits or any(p.kind is p.KEYWORD_ONLY for p in needed) or self.names & _TELLING
        if not self.by_name and strange:
            remedy = f"name them {', '.join(given)}, and behind these columns of the data set"
            if inspect.ismethod(self.function) and "shuffle_order" in self.names:  # of a judge of TRL's kind
                remedy = "pass the judge itself, whose method it is"
            raise ConfigError(f"{self.key} has the parameters {signature}; {remedy}")

    def check_columns(self, key: str, columns: Collection[str] | None) -> None:
        """ConfigError if the function needs a column that a data set lacks; nothing if that has not told its own."""
        missing = sorted(self.columns.difference(columns)) if columns is not None else []
        if missing:
            raise ConfigError(
                f"{self.key} needs {missing[0]!r}, and {key} has the columns {', '.join(columns or ())}; add it, or "
                "give the parameter a default"
            )

    def __call__(self, prompts: Sequence[Prompt], *texts: Sequence[str]) -> Tensor:
        """What the function returns, as float32 (B,) on the CPU; ConfigError unless that is numbers."""
        if not self.by_name:
            return numbers(self.key, self.function(prompts, *texts))
        offered = prompts.known if isinstance(prompts, Batch) else {}
        self.check_columns("what is judged", offered.keys())
        if len(texts) == 1 and isinstance(texts[0], Batch):
            offered = offered | texts[0].known
        offered = offered | dict(zip(self.given, map(list, (prompts, *texts)), strict=True))
        if self.takes_all and "completions" in offered:
            pairs = zip(prompts, texts[0], strict=True)
            offered["completions"] = [y if isinstance(x, str) else [as_message(x, y)] for x, y in pairs]
        chosen = offered if self.takes_all else {name: offered[name] for name in self.names & offered.keys()}
        return numbers(self.key, self.function(**chosen))


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
