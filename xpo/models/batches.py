"""Rows in batches: of similar length, padded, shared out. Shapes: N rows, L tokens of the longest."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xpo.models.logprobs import length_mask


def batches_by_length(lengths: Sequence[Any], size: int, longest_first: bool = False) -> Iterator[list[int]]:
    """The indices of rows, at most `size` of similar length at a time, so that little of a batch is padding.

    Args:
        lengths: of the rows; or (length, content): ties are then broken by content, so that the batches, and so the
            rounding, do not depend on the order of the rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=longest_first)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def shares(count: int, batch: int, rank: int, world: int) -> tuple[list[Sequence[int]], int]:
    """The rows of a data set that a rank answers, in equally many batches on every rank; and how many are its own.

    Ranks with fewer rows end with the first row of the data set, for company: under ZeRO-3 no rank can work alone.
    """
    mine = range(rank, count, world)
    of_rank_0 = math.ceil(count / world)
    return [mine[i : i + batch] or [0] for i in range(0, of_rank_0, batch)], math.ceil(len(mine) / batch)


def most(number: int, device: torch.device) -> int:
    """The largest number of all processes of the group."""
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def padded(rows: Sequence[Sequence[int]], pad: int = 0, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids as one tensor, and which of them are real, (N, L) each. A real token may be equal to `pad`."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    fill = [[pad] * (width - length) for length in lengths]
    whole = [[*more, *row] if side == "left" else [*row, *more] for row, more in zip(rows, fill, strict=True)]
    mask = length_mask(torch.tensor(lengths), width)
    return torch.tensor(whole, dtype=torch.long), mask.flip(1) if side == "left" else mask
