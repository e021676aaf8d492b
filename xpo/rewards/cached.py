"""Scores remembered on disk."""

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.data.store import Store
from xpo.models.fingerprints import digest
from xpo.rewards.base import RewardModel

_SCORE = struct.Struct("<f")


class CachedReward(RewardModel):
    """Scores each completion once; the score is kept in a file that epochs, resumes and jobs share.

    Missing scores (NaN) are not kept.

    Args:
        reward_model: who is asked.
        path: an SQLite file; see `xpo.data.store.Store`.
        commit_every: so many completions are scored and then written at a time: what a kill can lose.

    Raises:
        ConfigError: the reward model has no fingerprint.
    """

    def __init__(self, reward_model: RewardModel, path: Path | str, commit_every: int = 1024):
        self.reward_model = reward_model
        self.store = Store(path)
        self.commit_every = commit_every
        fingerprint = reward_model.fingerprint
        if fingerprint is None:
            raise ConfigError(
                f"judge.cache={str(path)!r} needs a reward model with a fingerprint, and "
                f"{type(reward_model).__name__} has none; define its property `fingerprint`, or set judge.cache=off"
            )
        self._fingerprint = fingerprint

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        texts = list(zip(prompts, completions, strict=True))
        keys = [digest("score", self._fingerprint, text) for text in texts]
        known = {key: _SCORE.unpack(value)[0] for key, value in self.store.get(keys).items()}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        for start in range(0, len(missing), self.commit_every):
            part = dict(list(missing.items())[start : start + self.commit_every])
            scores = self.reward_model.scores(*map(list, zip(*part.values(), strict=True)))
            fresh = dict(zip(part, scores.tolist(), strict=True))
            self.store.put({key: _SCORE.pack(score) for key, score in fresh.items() if score == score})
            known |= fresh
        return torch.tensor([known[key] for key in keys])

    @property
    def fingerprint(self) -> str:
        return self._fingerprint
