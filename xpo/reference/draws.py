"""The reference's completions: drawn once, and found again by every run that needs the same ones.

y~ and log pi_ref(y~) depend on the reference, the prompt, the sampling options, the seed and how often the
prompt was drawn before, but not on alpha, beta, the judge or the policy. A store keeps them: the jobs of a sweep
share them, which also pairs their comparison, and a resumed or repeated run computes none of them again.
"""

import struct
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

_LOGP = struct.Struct("<f")


class Draw(NamedTuple):
    """The reference's completions of B prompts.

    Attributes:
        completions: y~.
        logps: log pi_ref(y~), float32 (B,); NaN where it is not known yet, see `ReferenceDraws.keep`.
        keys: names of the draws, B strings.
        fresh: the rows that were not in the store.
    """

    completions: Completions
    logps: Tensor
    keys: list[str]
    fresh: list[int]


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
        found = self.store.get(keys) if self.store is not None else {}
        missing = [i for i, key in enumerate(keys) if key not in found]
        tokens: list[Tensor] = [torch.empty(0)] * len(keys)
        logps = torch.full((len(keys),), torch.nan)
        for i, key in enumerate(keys):
            if key in found:
                logps[i], tokens[i] = _unpack(found[key])
        if missing:
            rows = [int(names[i], 16) for i in missing]
            noise = sampling_noise((seed, stream, number), rows, self.sampler.sampling.max_new_tokens)
            with self.reference.model() as model:
                fresh = self.sampler.sample(model, [prompts[i] for i in missing], noise, device, greedy)
            for i, ids, mask in zip(missing, fresh.ids.cpu(), fresh.mask.cpu(), strict=True):
                tokens[i] = ids[mask]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.sampler.pad_token_id)
        return Draw(self.sampler.completions(ids.long().to(device)), logps, keys, missing)

    def keep(self, draw: Draw, logps: Tensor) -> None:
        """Puts what was drawn afresh into the store, with its log-probabilities, (B,); NaN if nobody needs them."""
        if self.store is None or not draw.fresh:
            return
        ids, mask = draw.completions.ids.cpu(), draw.completions.mask.cpu()
        self.store.put({draw.keys[i]: _pack(logps[i].item(), ids[i][mask[i]]) for i in draw.fresh})


def _pack(logp: float, tokens: Tensor) -> bytes:
    return _LOGP.pack(logp) + tokens.numpy().astype("<i4").tobytes()


def _unpack(value: bytes) -> tuple[float, Tensor]:
    tokens = np.frombuffer(value, dtype="<i4", offset=_LOGP.size).astype(np.int64)
    return _LOGP.unpack_from(value)[0], torch.from_numpy(tokens)
