"""Verdicts remembered on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpo.data.prompts import Prompt
from xpo.data.remembered import Remembered
from xpo.judges.base import Judge, Verdicts


class CachedJudge(Judge):
    """Asks a judge once for each pair; the verdict is kept in a file that epochs, resumes and jobs share.

    A pair is kept in one order: swapping its completions finds the same verdict with its sign turned.
    Failed verdicts (NaN) are not kept.

    Args:
        judge: who is asked.
        path: an SQLite file; see `xpo.data.store.Store`.
        commit_every: so many verdicts are asked for and then written at a time: what a kill can lose.

    Raises:
        ConfigError: the judge has no fingerprint.
    """

    def __init__(self, judge: Judge, path: Path | str, commit_every: int = 128):
        self.judge = judge
        self._verdicts = Remembered("verdict", "dd", judge, "judge", path, commit_every)

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.verdicts(prompts, first, second).margin

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        signs = [1.0 if a <= b else -1.0 for a, b in zip(first, second, strict=True)]
        pairs = [(x, *sorted((a, b))) for x, a, b in zip(prompts, first, second, strict=True)]
        margin, flipped = self._verdicts.columns(pairs, lambda *texts: self.judge.verdicts(*texts)[:2])
        return Verdicts(margin * torch.tensor(signs), flipped)

    @property
    def fingerprint(self) -> str:
        return self._verdicts.fingerprint

    def state(self) -> dict[str, Any]:
        return self.judge.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.judge.load_state(state)
