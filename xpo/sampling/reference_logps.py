"""log pi_ref of pairs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from xpo.models.forward import Forward, eval_mode
from xpo.models.reference import Reference
from xpo.sampling.completions import take_pairs, token_batches, tokens_of_pairs


@dataclass
class ReferenceLogps:
    """Computes them without a gradient, as many pairs at a time as fit."""

    reference: Reference
    forward: Forward  # how log-probabilities under it are computed
    tokens_at_once: int
    autocast: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        """Of both completions of some pairs of a batch, (2, b). All processes together.

        Args:
            batch: what `PairBatch.tensors` returns.
            rows: of b of its pairs.
        """
        logps = torch.empty(2, len(batch["prompt_ids"]), device=batch["prompt_ids"].device)
        with self.reference.model() as model, eval_mode(model), self.autocast():
            packed = self.forward.way == "packed"
            for part in token_batches(tokens_of_pairs(batch), rows, self.tokens_at_once, packed):
                logps[:, part] = self.forward(model, take_pairs(batch, part))
        return logps[:, list(rows)]
