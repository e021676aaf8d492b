"""What a reward model is: something that scores one completion of a prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt


class Scores(NamedTuple):
    """What a reward model says of B completions."""

    total: Tensor  # the rewards, (B,); see `RewardModel.scores`
    parts: dict[str, Tensor]  # what they are made of, by name, (B,) each; empty unless the model is a mix


class RewardModel(ABC):
    """Scores completions, read with its own chat template and tokenizer. One of your own needs `scores` only."""

    @abstractmethod
    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Rewards of B completions, decoded and without special tokens, of B prompts, strings or message lists.

        Returns:
            Float tensor (B,) on the CPU: higher is better, NaN where there is no score.
        """

    def scores_with_parts(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """The scores, and what they are made of."""
        return Scores(one_per_pair("reward_model", self.scores(prompts, completions), prompts), {})

    def check_data(self, key: str, dataset: PromptDataset) -> None:  # noqa: B027  # most take any prompts
        """ConfigError for a data set, called `key`, whose prompts it cannot score; before anything is sampled."""

    @property
    def fingerprint(self) -> str | None:
        """Names what scores depend on besides the texts: weights, not their name, and settings. None: never cached."""
        return None


def numbers(key: str, values: Any) -> Tensor:
    """What a user's function or class returns, as float32 on the CPU, None as NaN; ConfigError unless it is numbers."""
    if not isinstance(values, Tensor):
        try:
            listed = list(values)
        except TypeError:  # not even a list
            listed = [values]
        values = torch.tensor([_number(key, value) for value in listed])
    if values.is_complex():
        raise ConfigError(f"{key} returned a tensor of {values.dtype}; return real numbers")
    return values.detach().float().cpu()


def one_per_pair(key: str, values: Any, prompts: Sequence[Prompt]) -> Tensor:
    """`values` as float32 on the CPU; ConfigError unless it is one number per prompt, (B,)."""
    values = numbers(key, values)
    if values.shape != (len(prompts),):
        raise ConfigError(
            f"{key} returned a tensor of shape {tuple(values.shape)} for {len(prompts)} pairs; "
            f"return one number per pair, shape ({len(prompts)},)"
        )
    return values


def _number(key: str, value: Any) -> float:
    try:
        if not isinstance(value, str | bytes | complex):
            return float("nan") if value is None else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # a list, or a tensor of several
    raise ConfigError(f"{key} returned {value!r:.40}, which is no number; return a number for each, or None")
