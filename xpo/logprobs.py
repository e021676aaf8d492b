"""Log-probabilities of completions, and the masks and positions they need. Layer 0: torch only.

Notation for shapes: N sequences, P prompt tokens (padded on the left), C completion tokens (padded on
the right), V vocabulary.
"""

import torch
from torch import Tensor, nn


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
    """Position ids that start at 0 on the first real token of each row, (N, P + C); padding gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32 and without a copy of the distribution.

    Args:
        logits: (N, C, V), any float type.
        token_ids: (N, C).

    Returns:
        float32 (N, C).
    """
    return torch.stack(
        [
            row.float().gather(1, ids[:, None]).squeeze(1) - row.float().logsumexp(dim=1)
            for row, ids in zip(logits, token_ids, strict=True)
        ]
    )


def completion_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Summed log-probability of each completion given its prompt.

    Logits are asked for at the completion's positions only.

    Args:
        model: a causal language model that takes `position_ids` and `logits_to_keep`.
        input_ids: left-padded prompts followed by right-padded completions, (N, P + C).
        attention_mask: True on real tokens, (N, P + C).
        completion_mask: True on real completion tokens, (N, C).

    Returns:
        float32 (N,).
    """
    width = completion_mask.shape[1]
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=positions(attention_mask),
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits
    logps = token_logps(logits[:, -width - 1 : -1], input_ids[:, -width:])
    return torch.where(completion_mask, logps, torch.zeros_like(logps)).sum(dim=1)
