"""The judges of TRL's kind: an object with `judge(prompts, completions)`, where an answer is the best one's index."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt, plain_text
from xpo.judges.pairwise import PairwiseJudge
from xpo.rewards.base import one_per_pair

_LOG_ODDS = {0: 1.0, 1: -1.0, -1: torch.nan}  # by the index of the best completion; -1 is TRL's word for no verdict


@runtime_checkable
class HasJudge(Protocol):
    """What TRL's judges have in common."""

    def judge(self, prompts: Any, completions: Any) -> Any: ...


class TRLJudge(PairwiseJudge):
    """Asks a judge of TRL's kind, in an order drawn by `seed` and the texts in place of its own shuffling.

    An answer is the index of the best of two completions, or of both the best first; -1 is no verdict. A judge that
    takes `gold_completions` looks at one completion alone, 1 for right and 0 for wrong: the right one wins.

    Raises:
        ConfigError: its method does not take prompts and completions.
    """

    def __init__(self, judge: HasJudge, seed: int = 0):
        super().__init__(both_orders=False, seed=seed)
        self.name = type(judge).__name__
        parameters = inspect.signature(judge.judge).parameters
        if list(parameters)[:2] != ["prompts", "completions"]:
            raise ConfigError(
                f"judge={self.name}: its judge({', '.join(parameters)}) is not TRL's judge(prompts, completions); "
                "pass an xpo.judges.Judge or a function (prompts, first, second)"
            )
        self.judge = judge
        self.options = {"shuffle_order": False} if "shuffle_order" in parameters else {}
        self.sees_one = "gold_completions" in parameters

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        texts = [plain_text(prompt) for prompt in prompts]
        if self.sees_one:
            one, two = (self.judge.judge(texts, list(part), **self.options) for part in (first, second))
            right = [one_per_pair("judge", part, prompts) for part in (one, two)]
            return torch.where((right[0] < 0) | (right[1] < 0), torch.nan, right[0] - right[1])
        pairs = [list(pair) for pair in zip(first, second, strict=True)]
        answers = self.judge.judge(texts, pairs, **self.options)
        return one_per_pair("judge", [self._log_odds(answer) for answer in answers], prompts)

    def _log_odds(self, answer: Any) -> float:
        best = answer[0] if isinstance(answer, Sequence) and sorted(answer) == [0, 1] else answer
        if isinstance(best, Sequence | bool) or best not in _LOG_ODDS:
            raise ConfigError(
                f"judge={self.name} answered {answer!r:.40}; return the index of the best completion, 0 or 1, or -1"
            )
        return _LOG_ODDS[best]
