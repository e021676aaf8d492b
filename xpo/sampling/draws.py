"""The reference's completions: drawn once, and found again by every run that needs the same ones.

y~ depends on the reference, the prompt, the sampling options, the seed and how often the prompt was drawn before, but
not on alpha, beta, the judge or the policy. A store keeps it: the jobs of a sweep share their draws, which also pairs
their comparison, and a repeated run samples none again. log pi_ref(y~) is computed along with log pi_ref(y) each time,
in a pass like the policy's: a policy that equals the reference has a ratio of exactly 0, and a run that finds its draws
has the numbers of the one that drew them, on a CPU to the last bit.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xpo.data.store import Store
from xpo.models.fingerprints import digest
from xpo.models.reference import Reference
from xpo.sampling.completions import Completions
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler


class Draw(NamedTuple):
    """The reference's completions of B prompts, and which of them this run has computed, bool (B,)."""

    completions: Completions
    fresh: Tensor


class ReferenceDraws:
    """Draws y~, or finds it in the store.

    The noise of a draw is keyed by (seed, stream, number, prompt, occurrence): a completion does not depend on the
    batch, the step or the process that it is drawn in, but by rounding, which the batch's size changes.

    Args:
        reference: pi_ref.
        sampler: draws the completions.
        store: None computes everything afresh.
        precision: what else its numbers depend on: "bf16" under autocast, say.
    """

    def __init__(self, reference: Reference, sampler: Sampler, store: Store | None, precision: str = ""):
        self.reference = reference
        self.sampler = sampler
        self.store = store
        self._precision = precision
        self.reference_has_moved()
        self._drawn_ahead: set[str] = set()  # keys of what this run has put into the store and not asked for yet

    def reference_has_moved(self) -> None:
        """Its draws are other ones from here on."""
        settings = (*self.sampler.settings, self._precision)
        self._source = "" if self.store is None else digest(self.reference.fingerprint, settings)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        stream: int,
        number: int,
        device: torch.device,
        greedy: bool = False,
        ahead: Sequence[Sequence[int]] = (),
        occurrences: Sequence[int] = (),
    ) -> Draw:
        """The completions of tokenized prompts.

        Args:
            prompts: token ids of B prompts.
            seed: of the run.
            stream: see `xpo.sampling.noise`.
            number: how often these prompts were drawn before: the epoch.
            device: where the reference is.
            greedy: take the likeliest token instead of drawing one.
            ahead: prompts that will be asked for next: drawn along for the store, if there is one and something
                must be drawn. On a CPU 32 rows cost 1.4 times what 8 cost.
            occurrences: of `prompts` and `ahead`, see `xpo.data.prompt_sets.tokenize_prompts`; none: all 0.
        """
        every = [*prompts, *ahead] if self.store is not None else list(prompts)
        numbers = ([occurrence] if occurrence else [] for occurrence in occurrences or repeat(0))
        names = [digest(list(prompt), *number) for prompt, number in zip(every, numbers, strict=False)]
        keys = [digest("reference", self._source, seed, stream, number, greedy, name) for name in names]
        asked = keys[: len(prompts)]
        tokens = self._find(asked)
        fresh = torch.tensor([key not in tokens or key in self._drawn_ahead for key in asked])
        with self.reference.model() as model:  # even if nothing is missing here: it may be at another process
            if any(key not in tokens for key in asked):
                there = tokens.keys() | self._find(keys[len(prompts) :]).keys()
                missing = {key: i for i, key in enumerate(keys) if key not in there}
                rows = [int(names[i], 16) for i in missing.values()]
                noise = sampling_noise((seed, stream, number), rows, self.sampler.max_new_tokens)
                drawn = self.sampler.sample(model, [every[i] for i in missing.values()], noise, device, greedy)
                ids, masks = drawn.ids.cpu(), drawn.mask.cpu()
                new = {key: row[mask] for key, row, mask in zip(missing, ids, masks, strict=True)}
                if self.store is not None:
                    self.store.put({key: row.numpy().astype("<i4").tobytes() for key, row in new.items()})
                    self._drawn_ahead |= new.keys()
                tokens |= new
        self._drawn_ahead.difference_update(asked)
        ids = pad_sequence([tokens[key] for key in asked], batch_first=True, padding_value=self.sampler.pad_token_id)
        return Draw(self.sampler.completions(ids.to(device)), fresh)

    def _find(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tokens of those draws that the store has."""
        found = {} if self.store is None else self.store.get(keys, lambda row: bool(row) and len(row) % 4 == 0)
        return {key: torch.from_numpy(np.frombuffer(row, "<i4").astype(np.int64)) for key, row in found.items()}
