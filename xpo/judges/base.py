"""What a judge is: something that compares two completions of the same prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt
from xpo.rewards.base import Scores, one_per_pair

asked_to_stop: list[int] = []  # signals that ask for the end of the run: who waits for others gives up soon


class Verdicts(NamedTuple):
    """What a judge says of B pairs."""

    margin: Tensor  # log-odds that the first completion beats the second; see `Judge.margins`, (B,)
    flipped: Tensor  # 1 where the order of the completions changed the verdict, 0 where not, NaN: one was asked, (B,)
    scores: tuple[Scores, Scores] | None = None  # of first and second completions, where the margin is their difference


class Judge(ABC):
    """Compares pairs of completions, read with its own chat template and tokenizer. Your own needs `margins` only."""

    @abstractmethod
    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Log-odds that `first` beats `second`: B decoded completions each, without special tokens, of B prompts.

        Returns:
            Float tensor (B,) on the CPU: positive where `first` is better, 0 for a tie, NaN where the judge could not
            tell. Swapping `first` and `second` flips the sign.

        JudgeStopped if the judge cannot go on at all: training stops with a checkpoint.
        """

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """The margins, and where the verdict depends on the order of the completions, if that is known."""
        margin = one_per_pair("judge", self.margins(prompts, first, second), prompts)
        return Verdicts(margin, torch.full_like(margin, torch.nan))

    def check_data(self, key: str, dataset: PromptDataset) -> None:  # noqa: B027  # most take any prompts
        """ConfigError for a data set, called `key`, whose pairs it cannot judge; before anything is sampled."""

    @property
    def fingerprint(self) -> str | None:
        """Names what margins depend on besides the texts: weights, not their name, and settings. None: never cached."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the judge, as JSON: an LLM judge's requests so far, say."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  # most judges have no state
        """Goes on from what `state` returned. The default has nothing to go on from."""


class JudgeByVerdicts(Judge):
    """A judge that writes `verdicts`, of which its margins are a part."""

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.verdicts(prompts, first, second).margin


class JudgeOfAnother(JudgeByVerdicts):
    """What is made of another judge, `judge`, and goes on from its state."""

    judge: Judge

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        self.judge.check_data(key, dataset)

    def state(self) -> dict[str, Any]:
        return self.judge.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.judge.load_state(state)
