"""Randomness of rollouts: numbers that a draw takes from its own place, and how they choose a token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

# The random streams: y, y~, sampled labels and the rest never share their noise, nor training, evaluation and probe.
POLICY, REFERENCE, EVAL_POLICY, EVAL_REFERENCE, LABEL, SECOND, PROBE_POLICY, PROBE_REFERENCE = range(8)
ITERATE, CANDIDATES, REPLAY = range(8, 11)


def sampling_noise(key: Sequence[int], rows: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers that depend on (key, row) alone, whatever the batch or the process.

    Args:
        key: non-negative integers that name the draw: (seed, global step, stream).
        rows: the index of each row in the whole batch of all ranks, B integers.
        steps: tokens to draw.

    Returns:
        float64 in [0, 1), (B, steps).
    """
    return torch.from_numpy(np.stack([np.random.default_rng((*key, row)).random(steps) for row in rows]))


class InverseTransformSampler(LogitsProcessor):
    """Draws each row's next token with that row's own uniform number, by inverting its distribution.

    As the last logits processor of a greedy `generate` it leaves one finite logit per row. Unlike
    `torch.multinomial`, a row's token depends on its own logits and noise only: a rollout is the same
    in one batch or in several, on one process or on many, and consumes no global random state.
    """

    def __init__(self, noise: Tensor, prompt_width: int) -> None:
        self.noise = noise
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.double().softmax(dim=-1)
        if torch.are_deterministic_algorithms_enabled():
            probabilities = probabilities.cpu()  # CUDA's sums refuse to run under full_determinism
        cumulative = probabilities.cumsum(dim=-1)
        noise = self.noise[:, input_ids.shape[1] - self.prompt_width, None].to(cumulative.device)
        token = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token.to(scores.device), 0.0)
