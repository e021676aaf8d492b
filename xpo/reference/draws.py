"""The reference's completions: drawn once, and found again by every run that needs the same ones.

y~ depends on the reference, the prompt, the sampling options, the seed and how often the prompt was drawn
before, but not on alpha, beta, the judge or the policy. A store keeps it: the jobs of a sweep share their draws, which
also pairs their comparison, and a resumed or repeated run samples none of them again. log pi_ref(y~) is computed
along with log pi_ref(y) each time, in a pass like the policy's: so a policy that equals the reference has a
ratio of exactly 0, and a run that finds its draws has the numbers of the one that drew them to the last bit.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xpo.fingerprints import digest
from xpo.reference.model import Reference
from xpo.rollout import Completions, Sampler, sampling_noise
from xpo.store import Store


class Draw(NamedTuple):
    """The reference's completions of B prompts, and which of them were not in the store, bool (B,)."""

    completions: Completions
    fresh: Tensor


class ReferenceDraws:
    """Draws y~, or finds it in the store.

    The noise of a draw is keyed by (seed, stream, number, prompt): a completion does not depend on the batch, the
    step or the process that it is drawn in.

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
        self._source = ""
        if store is not None:
            settings = (asdict(sampler.sampling) | {"batch_size": None}, sampler.eos_token_ids, precision)
            self._source = digest(reference.fingerprint, settings)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        stream: int,
        number: int,
        device: torch.device,
        greedy: bool = False,
    ) -> Draw:
        """The completions of tokenized prompts.

        Args:
            prompts: token ids of B prompts.
            seed: of the run.
            stream: see `xpo.rollout`.
            number: how often these prompts were drawn before: the epoch.
            device: where the reference is.
            greedy: take the likeliest token instead of drawing one.
        """
        names = [digest(list(prompt)) for prompt in prompts]
        keys = [digest("reference", self._source, seed, stream, number, greedy, name) for name in names]
        tokens = {key: _unpack(value) for key, value in ({} if self.store is None else self.store.get(keys)).items()}
        fresh = torch.tensor([key not in tokens for key in keys])
        missing = fresh.nonzero().flatten().tolist()
        with self.reference.model() as model:  # even if nothing is missing here: it may be at another process
            new = {}
            if missing:
                rows = [int(names[i], 16) for i in missing]
                noise = sampling_noise((seed, stream, number), rows, self.sampler.max_new_tokens)
                drawn = self.sampler.sample(model, [prompts[i] for i in missing], noise, device, greedy)
                ids, masks = drawn.ids.cpu(), drawn.mask.cpu()
                new = {keys[i]: row[mask] for i, row, mask in zip(missing, ids, masks, strict=True)}
        tokens |= new
        if new and self.store is not None:
            self.store.put({key: _pack(ids) for key, ids in new.items()})
        ids = pad_sequence([tokens[key] for key in keys], batch_first=True, padding_value=self.sampler.pad_token_id)
        return Draw(self.sampler.completions(ids.to(device)), fresh)


def _pack(tokens: Tensor) -> bytes:
    return tokens.numpy().astype("<i4").tobytes()


def _unpack(value: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(value, dtype="<i4").astype(np.int64))
