"""Judges made of other judges, and a judge for controls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xpo.config.checks import number
from xpo.config.errors import ConfigError
from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt, coin
from xpo.judges.base import Judge, JudgeByVerdicts, JudgeOfAnother, Verdicts
from xpo.models.fingerprints import digest


class LengthControlledJudge(JudgeOfAnother):
    """Takes the length out of another judge's verdict: margin - coefficient * (characters more than the other).

    With a coefficient of 0.01, a hundred characters cost one unit of log-odds; a negative one rewards length.
    """

    def __init__(self, judge: Judge, coefficient: float):
        number("judge.coefficient", coefficient)
        self.judge = judge
        self.coefficient = coefficient

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        margin, flipped, _ = self.judge.verdicts(prompts, first, second)
        longer = torch.tensor([float(len(a) - len(b)) for a, b in zip(first, second, strict=True)])
        return Verdicts(margin - self.coefficient * longer, flipped)

    @property
    def fingerprint(self) -> str | None:
        inner = self.judge.fingerprint
        return inner and digest("length controlled", inner, self.coefficient)


class AllOfJudge(JudgeByVerdicts):
    """Who wins by every judge wins, by their smallest margin; else it is a tie. NaN where one could not tell."""

    def __init__(self, judges: dict[str, Judge]):
        if len(judges) < 2:
            raise ConfigError(f"judge.judges={list(judges)!r} are too few; name two judges or more")
        self.judges = dict(judges)

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Flipped where any of the judges, of those that ask both orders, changed its verdict."""
        verdicts = [judge.verdicts(prompts, first, second) for judge in self.judges.values()]
        margins = torch.stack([verdict.margin for verdict in verdicts])  # (judges, B)
        flips = torch.stack([verdict.flipped for verdict in verdicts])
        sign = margins[0].sign()
        margin = torch.where((margins.sign() == sign).all(dim=0), sign * margins.abs().amin(dim=0), 0.0)
        margin = torch.where(margins.isfinite().all(dim=0), margin, torch.nan)
        flipped = torch.where(flips.isnan().all(dim=0), torch.nan, flips.nan_to_num(0.0).amax(dim=0))
        return Verdicts(margin, flipped)

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        for judge in self.judges.values():
            judge.check_data(key, dataset)

    @property
    def fingerprint(self) -> str | None:
        inner = [judge.fingerprint for judge in self.judges.values()]
        return None if None in inner else digest("all of", inner)

    def state(self) -> dict[str, Any]:
        return {name: judge.state() for name, judge in self.judges.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, judge in self.judges.items():
            judge.load_state(state.get(name, {}))


class RandomJudge(Judge):
    """A fair coin for each pair, fixed by `seed` and the texts: what training does on no signal at all."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        tosses = [coin(self.seed, *pair) for pair in zip(prompts, first, second, strict=True)]
        return torch.tensor([1.0 if heads else -1.0 for heads in tosses])
