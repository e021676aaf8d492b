"""Log-probabilities of completions, and the masks and positions they need. Layer 0: torch only.

Notation for shapes: b prompts with K completions each, P prompt tokens (padded on the left), C completion
tokens (padded on the right), V vocabulary, H hidden size, T completion tokens in all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26  # of the vocabulary projection: 256 MiB in float32


def completion_lengths(completion_ids: Tensor, eos_token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each completion ends, told by the position of its first EOS and never by the pad token.

    Args:
        completion_ids: generated tokens, (N, C); whatever stands behind the first EOS is padding.
        eos_token_ids: the tokens that end a completion, (E,).

    Returns:
        The number of tokens including the EOS, long (N,); and whether there is an EOS, bool (N,).
    """
    is_eos = torch.isin(completion_ids, eos_token_ids)
    ended = is_eos.any(dim=1)
    first_eos = is_eos.int().argmax(dim=1)
    return torch.where(ended, first_eos + 1, completion_ids.shape[1]), ended


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True on the first `lengths` positions of `width`: bool (N, width)."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that start at 0 on the first real token of each row, (N, L); padding gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log softmax(logits)[token] in float32: (...), from logits (..., V) of any float type and ids (...)."""
    return _TokenLogps.apply(logits.float(), token_ids)


class _TokenLogps(torch.autograd.Function):
    """Its gradient, (token == v) - softmax(logits)[v], in one tensor as large as the logits; autograd makes three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        normalizer = logits.logsumexp(dim=-1)
        ctx.save_for_backward(logits, token_ids, normalizer)
        return logits.gather(-1, token_ids[..., None]).squeeze(-1) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, token_ids, normalizer = ctx.saved_tensors
        gradient = gradient[..., None]
        of_logits = torch.sub(logits, normalizer[..., None]).exp_().mul_(-gradient)
        return of_logits.scatter_add_(-1, token_ids[..., None], gradient), None


class Layout(NamedTuple):
    """How pairs are put before a model.

    Attributes:
        packed: all of them one behind the other in one row, without padding; or each in its own row.
        mask: from which columns are real, (b, L), and which segment they belong to, (L,), what the model's attention
            takes as its mask.
    """

    packed: bool
    mask: Callable[[Tensor, Tensor], Any]


def completion_logps(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Summed log-probability of each completion given its prompt, one row of the model for each.

    Right for every causal language model that takes `position_ids` and `logits_to_keep`.

    Args:
        model: the model.
        prompt_ids: left-padded, (b, P).
        prompt_mask: True on real tokens, (b, P).
        ids: completions, right-padded, (K, b, C).
        mask: True on real completion tokens, (K, b, C).

    Returns:
        float32 (K, b).
    """
    completions, count, width = ids.shape
    prompts = (part.expand(completions, -1, -1).flatten(0, 1) for part in (prompt_ids, prompt_mask))
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
    input_ids, attention_mask = (torch.cat(parts, dim=1) for parts in zip(prompts, (ids, mask), strict=True))
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=positions(attention_mask),
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits[:, -width - 1 : -1]
    # Row by row: a float32 copy of all logits would double their memory.
    logps = torch.stack([token_logps(row, tokens) for row, tokens in zip(logits, ids, strict=True)])
    return torch.where(mask, logps, torch.zeros_like(logps)).sum(dim=1).view(completions, count)


def shared_prompt_logps(
    model: nn.Module,
    head: nn.Module,
    layout: Layout,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """The same, with one row [prompt | completion 1 | ... | completion K] for each prompt.

    The prompt is computed once. A completion sees the prompt and itself, and its positions go on from the
    prompt's. Hidden states are projected to the vocabulary at completion tokens only, and no more of them
    at a time than `logits_at_once` allows: memory hardly grows with the vocabulary.

    Args:
        model: takes a mask of four dimensions; its layers attend to whatever that mask allows, and its
            logits are exactly what `head` returns.
        head: the model's output embedding.
        layout: of the rows; packed only within `xpo.models.attention.packed_attention`.
        logits_at_once: tokens times V.

    Returns:
        float32 (K, b).
    """
    rows = _side_by_side(prompt_ids, prompt_mask, ids, mask)
    if layout.packed:
        place = rows.real.flatten().cumsum(0).view_as(rows.real) - 1
        given_ids, given_positions = rows.ids[rows.real][None], rows.positions[rows.real][None]  # (1, all tokens)
    else:
        place = torch.arange(rows.real.numel(), device=ids.device).view_as(rows.real)
        given_ids, given_positions = rows.ids, rows.positions
    before = place[rows.row, rows.before]
    project = head.forward

    def logps_of_targets(hidden: Tensor) -> Tensor:
        return chunked_logps(project, hidden.flatten(0, 1)[before], rows.targets, logits_at_once)

    # The model's own forward runs, with all that wraps it (DistributedDataParallel, autocast, hooks); only what
    # it returns as logits are the log-probabilities of the targets.
    with replaced_forward(head, logps_of_targets):
        logps = model(
            input_ids=given_ids,
            attention_mask=layout.mask(rows.real, rows.segment),
            position_ids=given_positions,
            use_cache=False,
        ).logits  # (T,)
    completions, count, _ = ids.shape
    sums = torch.zeros(completions * count, device=ids.device)
    return sums.index_add(0, rows.completion * count + rows.row, logps).view(completions, count)


class _Rows(NamedTuple):
    """Prompts with their completions behind them: b rows of L columns, T completion tokens to be scored in all.

    Attributes:
        ids, real, positions: of the rows, (b, L); real is False on padding.
        segment: 0 for the prompt's columns, k for those of completion k, (L,).
        targets: the completion tokens, (T,).
        row, before: where the token before each target is, which predicts it, (T,).
        completion: from 0 on, which completion of its prompt a target belongs to, (T,).
    """

    ids: Tensor
    real: Tensor
    positions: Tensor
    segment: Tensor
    targets: Tensor
    row: Tensor
    before: Tensor
    completion: Tensor


def _side_by_side(prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> _Rows:
    """The rows; of completions without the columns that are padding in all of them."""
    prompt_width = prompt_ids.shape[1]
    widths = [int(part.sum(dim=1).max()) for part in mask]
    parts = [(ids[k, :, :width], mask[k, :, :width]) for k, width in enumerate(widths)]
    lengths = prompt_mask.sum(dim=1, keepdim=True)
    row_ids = torch.cat([prompt_ids, *(part for part, _ in parts)], dim=1)
    segment = torch.cat([torch.full((width,), k) for k, width in enumerate([prompt_width, *widths])]).to(ids.device)

    # Completion token j of segment k is predicted by the token before it: for j = 0 the prompt's last one.
    starts = [prompt_width + sum(widths[:k]) for k in range(len(widths))]
    columns = torch.cat(
        [
            torch.cat([torch.tensor([prompt_width - 1]), torch.arange(start, start + width - 1)])
            for start, width in zip(starts, widths, strict=True)
        ]
    ).to(ids.device)
    row, place = torch.cat([part for _, part in parts], dim=1).nonzero(as_tuple=True)
    return _Rows(
        ids=row_ids,
        real=torch.cat([prompt_mask, *(part for _, part in parts)], dim=1),
        positions=torch.cat([positions(prompt_mask), *(lengths + positions(part) for _, part in parts)], dim=1),
        segment=segment,
        targets=row_ids[:, prompt_width:][row, place],
        row=row,
        before=columns[place],
        completion=(segment[prompt_width:] - 1)[place],
    )


def block_mask(real: Tensor, segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom: earlier real tokens of the same segment and of segment 0, the prompt; everybody itself.

    Args:
        real: False on padding, (b, L).
        segment: 0 for the prompt's columns, k for those of completion k, (L,).
        dtype: bool for True where a query sees a key; a float type for 0 there and the smallest number elsewhere.

    Returns:
        (b, 1, L, L).
    """
    width = len(segment)
    earlier = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
    family = (segment[:, None] == segment) | (segment == 0)
    sees = (earlier & family & real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=real.device)
    sees = sees[:, None]
    if dtype == torch.bool:
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=real.device).masked_fill(~sees, torch.finfo(dtype).min)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, calling `module` does `forward`; hooks on the module stay in force."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def chunked_logps(project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, logits_at_once: int) -> Tensor:
    """Log-probabilities of tokens from hidden states, float32 (T,); logits are computed again for gradients.

    Args:
        project: from (t, H) to logits (t, V).
        hidden: (T, H).
        targets: (T,).
        logits_at_once: tokens times V. With fewer logits in all, they are kept for the gradient instead.
    """

    def logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logps(project(hidden), targets)

    kind = hidden.device.type
    # Autocast must not keep a copy of the weights made without a gradient: the projections below would use it.
    autocast = torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )
    with torch.no_grad(), autocast:
        vocabulary = project(hidden[:1]).shape[-1]
    chunk = max(logits_at_once // vocabulary, 1)
    if len(hidden) <= chunk:
        return logps(hidden, targets)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([logps(*part) for part in parts])
    return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])
