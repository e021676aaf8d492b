"""Attention among packed pairs: rows [prompt | completion 1 | ...] one behind the other, without padding.

No pair computes attention to another one: on a CPU each attends by itself, on CUDA FlexAttention skips the blocks
that hold nothing to see. Layer 0: torch, and transformers' table of attention functions.

Notation for shapes: b pairs with K completions each, L columns of a padded row, T tokens in all, h heads, D their size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from xpo.models.logprobs import having

_NAME = "xpo_packed_pairs"
_compiled_flex = cache(partial(torch.compile, flex_attention, dynamic=True))  # once, and not before it is needed


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends by `attend`, to what a mask from `lengths_of_pairs` or `blocks_of_pairs` allows."""
    with having(model.config.get_text_config(), "_attn_implementation", _NAME):
        try:
            yield
        finally:
            _completions_see.cache_clear()


def lengths_of_pairs(real: Tensor, segment: Tensor) -> Tensor:
    """The tokens of each prompt and of its completions, in four dimensions like any mask: long (1, 1, b, 1 + K).

    Args:
        real: False on padding, (b, L).
        segment: 0 for the prompt's columns, k for those of completion k, (L,).
    """
    return torch.stack([real[:, segment == k].sum(dim=1) for k in range(int(segment.max()) + 1)], dim=1)[None, None]


def blocks_of_pairs(real: Tensor, segment: Tensor) -> BlockMask:
    """The same for FlexAttention: which blocks of T tokens by T tokens hold anything to see."""
    pair = torch.arange(len(real), device=real.device)[:, None].expand_as(real)[real]  # (T,)
    part = segment.expand_as(real)[real]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        family = (part[key] == 0) | (part[key] == part[query])
        return (pair[query] == pair[key]) & family & (key <= query)

    return create_block_mask(sees, None, None, len(pair), len(pair), device=str(real.device))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' models for packed pairs: (1, T, h, D), and no attention weights.

    Args:
        query: (1, h, T, D).
        key, value: (1, h or fewer, T, D).
        attention_mask: see `lengths_of_pairs` and `blocks_of_pairs`.

    Raises:
        ValueError: the model asks for what these kernels lack.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"packed pairs have no {asked[0]} in their attention")
    groups = query.shape[1] // key.shape[1]
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotated in float32 under autocast
    if isinstance(attention_mask, BlockMask):
        if dropout:
            raise ValueError("FlexAttention has no dropout; set disable_dropout=True or pair_forward='shared'")
        flex: Any = _compiled_flex() if query.is_cuda else flex_attention
        output = flex(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=groups > 1)
    else:
        # (1, h, T, D)
        key, value = (part[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for part in (key, value))
        output = _pair_by_pair(query, key, value, attention_mask, dropout, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, attend)


@torch.compiler.disable  # a compiled model calls it as it is: its loop would be unrolled for each set of lengths
def _pair_by_pair(
    query: Tensor, key: Tensor, value: Tensor, mask_of_lengths: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Two calls for each pair: the prompt attends to itself, its completions to prompt and themselves."""
    lengths = mask_of_lengths[0, 0].tolist()
    queries = iter(query.split([part for prompt, *answers in lengths for part in (prompt, sum(answers))], dim=2))
    whole = [sum(pair) for pair in lengths]
    attention = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    outputs: list[Tensor] = []
    for pair, keys, values in zip(lengths, key.split(whole, dim=2), value.split(whole, dim=2), strict=True):
        prompt = keys[:, :, : pair[0]], values[:, :, : pair[0]]
        outputs.append(attention(next(queries), *prompt, is_causal=True))
        mask = _completions_see(tuple(pair), query.device)
        outputs.append(attention(next(queries), keys, values, attn_mask=mask))
    return torch.cat(outputs, dim=2)


@cache  # all layers of a pass ask for the same ones
def _completions_see(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """What the completions of one pair see of prompt and completions, bool (their tokens, all tokens)."""
    segment = torch.cat([torch.full((length,), k, device=device) for k, length in enumerate(lengths)])
    family = (segment[:, None] == segment) | (segment == 0)
    return (family & torch.ones_like(family).tril())[lengths[0] :]
