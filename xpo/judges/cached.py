"""Verdicts remembered on disk."""

from collections.abc import Sequence
from pathlib import Path

import torch

from xpo.data.prompts import Prompt
from xpo.data.remembered import Remembered
from xpo.judges.base import Judge, JudgeOfAnother, Verdicts


class CachedJudge(JudgeOfAnother):
    """Asks a judge once for each pair; all verdicts but NaN are kept in a file that epochs, resumes and jobs share.

    A pair is kept in one order: swapping its completions finds the same verdict with its sign turned. `path` and
    `commit_every` are those of `xpo.data.remembered.Remembered`; ConfigError for a judge without a fingerprint.
    """

    def __init__(self, judge: Judge, path: Path | str, commit_every: int = 128):
        self.judge = judge
        self._verdicts = Remembered("verdict", "dd", judge, "judge", path, commit_every)

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        signs = [1.0 if a <= b else -1.0 for a, b in zip(first, second, strict=True)]
        pairs = [(x, *sorted((a, b))) for x, a, b in zip(prompts, first, second, strict=True)]
        margin, flipped = self._verdicts.columns(pairs, lambda *texts: self.judge.verdicts(*texts)[:2])
        return Verdicts(margin * torch.tensor(signs), flipped)

    @property
    def fingerprint(self) -> str:
        return self._verdicts.fingerprint
