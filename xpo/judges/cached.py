"""Verdicts remembered on disk."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.data.store import Store
from xpo.judges.base import Judge, Verdicts
from xpo.models.fingerprints import digest

_VERDICT = struct.Struct("<dd")  # margin, flipped


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
        self.store = Store(path)
        self.commit_every = commit_every
        fingerprint = judge.fingerprint
        if fingerprint is None:
            raise ConfigError(
                f"judge.cache={str(path)!r} needs a judge with a fingerprint, and {type(judge).__name__} has none; "
                "define its property `fingerprint`, or set judge.cache=off"
            )
        self._fingerprint = fingerprint

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.verdicts(prompts, first, second).margin

    def verdicts(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        signs = [1.0 if a <= b else -1.0 for a, b in zip(first, second, strict=True)]
        pairs = [(x, *sorted((a, b))) for x, a, b in zip(prompts, first, second, strict=True)]
        keys = [digest("verdict", self._fingerprint, pair) for pair in pairs]
        known = {key: _VERDICT.unpack(value) for key, value in self.store.get(keys).items()}
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        for start in range(0, len(missing), self.commit_every):
            part = dict(list(missing.items())[start : start + self.commit_every])
            margin, flipped, _ = self.judge.verdicts(*map(list, zip(*part.values(), strict=True)))
            fresh = dict(zip(part, zip(margin.tolist(), flipped.tolist(), strict=True), strict=True))
            self.store.put({key: _VERDICT.pack(*verdict) for key, verdict in fresh.items() if _finite(verdict[0])})
            known |= fresh
        margin, flipped = torch.tensor([known[key] for key in keys]).view(-1, 2).T
        return Verdicts(margin * torch.tensor(signs), flipped)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def state(self) -> dict[str, Any]:
        return self.judge.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.judge.load_state(state)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # False for NaN too
