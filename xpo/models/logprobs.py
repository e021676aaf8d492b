"""Log-probabilities of completions, and the masks and positions they need. Layer 0: torch only.

Notation for shapes: b prompts with K completions each, P prompt tokens (padded on the left), C completion
tokens (padded on the right), V vocabulary, H hidden size, T completion tokens in all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26  # of the vocabulary projection: 256 MiB in float32


def completion_lengths(completion_ids: Tensor, eos_token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where completions (N, C) end: at the first of the EOS tokens (E,), whatever stands behind it.

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
    return _TokenLogps.apply(logits, token_ids)


class _TokenLogps(torch.autograd.Function):
    """Its gradient, (token == v) - softmax(logits)[v], in one tensor as large as the logits; autograd makes three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        exact = logits.float()
        normalizer = exact.logsumexp(dim=-1)
        ctx.save_for_backward(logits, token_ids, normalizer)  # as they are: in half precision, half as large
        return exact.gather(-1, token_ids[..., None]).squeeze(-1) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, token_ids, normalizer = ctx.saved_tensors
        gradient = gradient[..., None]
        of_logits = torch.sub(logits, normalizer[..., None]).exp_().mul_(-gradient)  # in float32
        return of_logits.scatter_add_(-1, token_ids[..., None], gradient).to(logits.dtype), None


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
    """Summed log-probability of each completion given its prompt, float32 (K, b); one row of the model for each.

    Right for every causal language model that takes `position_ids` and `logits_to_keep`.

    Args:
        prompt_ids, prompt_mask: left-padded; True on real tokens, (b, P).
        ids, mask: completions, right-padded; True on real tokens, (K, b, C).
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
    # In parts: a float32 copy of all logits would double their memory.
    rows = max(LOGITS_AT_ONCE // logits[0].numel(), 1)
    logps = torch.cat([token_logps(*part) for part in zip(logits.split(rows), ids.split(rows), strict=True)])
    return torch.where(mask, logps, torch.zeros_like(logps)).sum(dim=1).view(completions, count)


def shared_prompt_logps(
    model: nn.Module,
    head: nn.Module,
    layout: Layout,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
) -> Tensor:
    """The same, with one row [prompt | completion 1 | ... | completion K] for each prompt.

    The prompt is computed once. A completion sees the prompt and itself, and its positions go on from the
    prompt's. Hidden states are projected to the vocabulary at completion tokens only, and no more of them
    at a time than `LOGITS_AT_ONCE` allows: memory hardly grows with the vocabulary.

    Args:
        model: takes a mask of four dimensions; its layers attend to whatever that mask allows, and its
            logits are exactly what `head` returns.
        head: the model's output embedding.
        layout: of the rows; packed only within `xpo.models.attention.packed_attention`.
    """
    used = mask.any(dim=1)  # the columns that are not padding in all rows, (K, C)

    def side_by_side(prompts: Tensor, completions: Tensor) -> Tensor:  # (b, L)
        return torch.cat([prompts, completions.transpose(0, 1)[:, used]], dim=1)

    further = prompt_mask.sum(dim=1, keepdim=True) + positions(mask.flatten(0, 1)).view_as(mask)
    given_ids, given_positions = side_by_side(prompt_ids, ids), side_by_side(positions(prompt_mask), further)
    real = side_by_side(prompt_mask, mask)
    segment = F.pad(used.nonzero()[:, 0] + 1, (prompt_ids.shape[1], 0))  # 0 is the prompt's, k that of completion k
    # A completion token is predicted by the one before it; the first of a completion by the prompt's last one.
    row, column = (real & (segment > 0)).nonzero(as_tuple=True)  # (T,)
    predictor = torch.where(segment[column - 1] == segment[column], column - 1, prompt_ids.shape[1] - 1)
    targets = given_ids[row, column]
    if layout.packed:
        place = real.flatten().cumsum(0).view_as(real) - 1
        given_ids, given_positions = given_ids[real][None], given_positions[real][None]  # (1, all tokens)
    else:
        place = torch.arange(real.numel(), device=ids.device).view_as(real)
    before = place[row, predictor]
    project = head.forward

    def logps_of_targets(hidden: Tensor) -> Tensor:
        return chunked_logps(project, hidden.flatten(0, 1)[before], targets, LOGITS_AT_ONCE)

    # The model's own forward runs, with all that wraps it (DistributedDataParallel, autocast, hooks); only what
    # it returns as logits are the log-probabilities of the targets.
    with replaced_forward(head, logps_of_targets):
        logps = model(
            input_ids=given_ids,
            attention_mask=layout.mask(real, segment),
            position_ids=given_positions,
            use_cache=False,
        ).logits  # (T,)
    completions, count, _ = ids.shape
    sums = torch.zeros(completions * count, device=ids.device)
    return sums.index_add(0, (segment[column] - 1) * count + row, logps).view(completions, count)


def block_mask(real: Tensor, segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom, (b, 1, L, L): earlier real tokens of its segment and of segment 0, the prompt; everybody itself.

    Args:
        real, segment: see `xpo.models.attention.lengths_of_pairs`.
        dtype: bool for True where a query sees a key; a float type for 0 there and the smallest number elsewhere.
    """
    width = len(segment)
    earlier = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
    family = (segment[:, None] == segment) | (segment == 0)
    itself = torch.eye(width, dtype=torch.bool, device=real.device)
    sees = ((earlier & family & real[:, None, :]) | itself)[:, None]
    if dtype == torch.bool:
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=real.device).masked_fill(~sees, torch.finfo(dtype).min)


@contextmanager
def having(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Within, the attribute `name` has another value."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


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
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
        vocabulary = project(hidden[:1]).shape[-1]
    chunk = max(logits_at_once // vocabulary, 1)
    if len(hidden) <= chunk:
        return logps(hidden, targets)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([logps(*part) for part in parts])
    return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])
