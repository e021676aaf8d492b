"""Completions, the pairs that they make, and parts of them.

Notation for shapes: B pairs of the optimizer step on this rank, P prompt tokens (padded on the left),
C completion tokens (padded on the right).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from xpo.data.prompts import Batch


@dataclass(frozen=True)
class Completions:
    """Completions of B prompts by one model.

    Attributes:
        ids: tokens up to and including the EOS, then padding, (B, C).
        mask: True on real tokens, (B, C).
        ended: whether the completion contains an EOS token, (B,).
        texts: decoded without special tokens, B strings.
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor
    texts: list[str]


@dataclass(frozen=True)
class PairBatch:
    """The pairs of one optimizer step: prompts x and two completions of each, padded to one width.

    Attributes:
        prompt_ids: left-padded, (B, P).
        prompt_mask: True on real tokens, (B, P).
        first: y, the policy's.
        second: y~, whose log-probability is the exploration bonus.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    first: Completions
    second: Completions

    def tensors(self) -> dict[str, Tensor]:
        """prompt_ids and prompt_mask, (B, P); completion_ids and completion_mask, (2, B, C): y at index 0, y~ at 1."""
        return {
            "prompt_ids": self.prompt_ids,
            "prompt_mask": self.prompt_mask,
            "completion_ids": torch.stack([self.first.ids, self.second.ids]),
            "completion_mask": torch.stack([self.first.mask, self.second.mask]),
        }


def tokens_of_pairs(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of each pair in what `PairBatch.tensors` returns: its prompt and both completions, (B,)."""
    return batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=(0, 2))


def micro_batches(batch: dict[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """Pairs, and what is known of them, in micro-batches of at least these sizes; similar lengths go together.

    What there is beyond the sum of the sizes is spread over all micro-batches.
    """
    more, number = len(batch["prompt_ids"]) - sum(sizes), len(sizes)
    parts = [size + len(range(i, more, number)) for i, size in enumerate(sizes)]
    order = tokens_of_pairs(batch).cpu().argsort(descending=True, stable=True)
    return [take_pairs(batch, rows.tolist()) for rows in order.split(parts)]


def joined(batches: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """The pairs of several batches in one, padded to the longest."""
    prompt, completion = (max(one[name].shape[-1] for one in batches) for name in ("prompt_ids", "completion_ids"))
    whole: dict[str, Tensor] = {}
    for name in batches[0]:
        fill = pad_token_id if name.endswith("_ids") else 0
        width = {"prompt": prompt, "completion": completion}.get(name.rpartition("_")[0])
        parts = [one[name] for one in batches]
        if width is not None:
            more = [width - part.shape[-1] for part in parts]
            sides = [(n, 0) if name.startswith("prompt") else (0, n) for n in more]
            parts = [pad(part, side, value=fill) for part, side in zip(parts, sides, strict=True)]
        whole[name] = torch.cat(parts, dim=_PAIR_DIMENSION.get(name, 0))
    return whole


def picked(candidates: Sequence[Completions], which: Tensor) -> Completions:
    """Of each of B prompts one of its candidates, all of one width; by index, (B,)."""
    rows = list(enumerate(which.tolist()))
    ids, mask, ended = (
        torch.stack([getattr(candidates[n], name)[i] for i, n in rows]) for name in ("ids", "mask", "ended")
    )
    texts = [candidates[n].texts[i] for i, n in rows]
    return Completions(ids, mask, ended, Batch(texts, {"completion_ids": [ids[i][mask[i]].tolist() for i, _ in rows]}))


# Where the pairs are in what a micro-batch holds: the second dimension of what there is once per completion.
_PAIR_DIMENSION = {"completion_ids": 1, "completion_mask": 1, "reference_logps": 1}


def take_pairs(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Some pairs of a micro-batch, without the columns that are padding in all of them."""
    index = torch.tensor(list(rows), device=batch["prompt_ids"].device)
    part = {name: values.index_select(_PAIR_DIMENSION.get(name, 0), index) for name, values in batch.items()}
    first_column = int(part["prompt_mask"].any(dim=0).int().argmax())
    width = int(part["completion_mask"].sum(dim=2).max())
    cut = {name: part[name][:, first_column:] for name in ("prompt_ids", "prompt_mask")}
    return part | cut | {name: part[name][..., :width] for name in ("completion_ids", "completion_mask")}


def token_batches(lengths: Tensor, rows: Sequence[int], budget: int | None, packed: bool = False) -> list[list[int]]:
    """Rows of similar length together, as many as fit: the longest times their number is at most `budget`.

    Args:
        lengths: tokens of each row, (B,).
        rows: which of the B rows to batch.
        budget: tokens with padding; a row that is longer has a batch of its own. None: one batch.
        packed: there is no padding, so the sum of the lengths is at most `budget`.

    Returns:
        Batches of rows, the longest first.
    """
    length = lengths.tolist()
    batches: list[list[int]] = []
    for row in sorted(rows, key=length.__getitem__, reverse=True):
        more = [*batches[-1], row] if batches else [row]
        tokens = sum(length[i] for i in more) if packed else length[more[0]] * len(more)
        if batches and (budget is None or tokens <= budget):
            batches[-1] = more
        else:
            batches.append([row])
    return batches


def tokens_at_once(device: torch.device) -> int:
    """Tokens of a forward pass beyond which more in one pass no longer gain speed, and only cost padding."""
    return 1536 if device.type == "cpu" else 16_384


def same_width(first: Completions, second: Completions, pad_token_id: int) -> tuple[Completions, Completions]:
    """Two sets of completions padded to one width."""
    width = max(first.ids.shape[1], second.ids.shape[1])

    def widened(one: Completions) -> Completions:
        more = (0, width - one.ids.shape[1])
        return replace(one, ids=pad(one.ids, more, value=pad_token_id), mask=pad(one.mask, more, value=0))

    return widened(first), widened(second)
