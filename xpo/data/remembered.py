"""Numbers remembered on disk: what is expensive to compute is computed once."""

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.store import open_store
from xpo.models.fingerprints import digest


class Fingerprinted(Protocol):
    """Something that says what its numbers depend on besides the texts; None if it cannot."""

    @property
    def fingerprint(self) -> str | None: ...


class Remembered:
    """The numbers of rows of texts, in a file that epochs, resumes and jobs share.

    Args:
        kind: what the numbers are, a part of their keys.
        layout: of the numbers of a row, a letter for each; see `struct`.
        source: what computes them.
        role: of the source, in words.
        path: an SQLite file; see `xpo.data.store.Store`.
        commit_every: so many rows are computed and then written at a time: what a kill can lose.

    Raises:
        ConfigError: the source has no fingerprint.
    """

    def __init__(self, kind: str, layout: str, source: Fingerprinted, role: str, path: Path | str, commit_every: int):
        fingerprint = source.fingerprint
        if fingerprint is None:
            raise ConfigError(
                f"judge.cache={str(path)!r} needs a {role} with a fingerprint, and {type(source).__name__} has none; "
                "define its property `fingerprint`, or set judge.cache=off"
            )
        self.fingerprint = fingerprint
        self.kind = kind
        self.layout = struct.Struct(f"<{layout}")
        self.width = len(layout)
        self.store = open_store("judge.cache", path)
        self.commit_every = commit_every

    def columns(self, rows: Sequence[tuple[Any, ...]], compute: Callable[..., Sequence[Tensor]]) -> Tensor:
        """The numbers of N rows, float32 (numbers, N). Rows whose first number is not finite are not kept.

        `compute` takes the columns of B rows and returns the columns of their numbers, (B,) each.
        """
        keys = [digest(self.kind, self.fingerprint, row) for row in rows]
        stored = self.store.get(keys, lambda value: len(value) == self.layout.size)
        known = {key: self.layout.unpack(value) for key, value in stored.items()}
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        for start in range(0, len(missing), self.commit_every):
            part = dict(list(missing.items())[start : start + self.commit_every])
            computed = compute(*map(list, zip(*part.values(), strict=True)))
            fresh = dict(zip(part, zip(*(column.tolist() for column in computed), strict=True), strict=True))
            self.store.put({key: self.layout.pack(*row) for key, row in fresh.items() if math.isfinite(row[0])})
            known |= fresh
        return torch.tensor([known[key] for key in keys]).view(-1, self.width).T
