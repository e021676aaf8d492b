"""The pairs of an optimizer step: the first completion of each prompt is the policy's, the second the reference's."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xpo.data.prompts import Prompt
from xpo.models.reference import base_model
from xpo.models.zero import sampling
from xpo.sampling.completions import PairBatch, same_width
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.noise import POLICY, REFERENCE, SECOND, sampling_noise
from xpo.sampling.sampler import Sampler


class StepPrompts(NamedTuple):
    """The prompts of one optimizer step on this process, B in all its micro-batches."""

    prompts: list[Prompt]
    ids: list[list[int]]  # their tokens
    rows: list[int]  # the place of each in the optimizer batch of all processes
    sizes: list[int]  # how many each micro-batch has
    ahead: list[list[int]]  # tokens of prompts of the next steps, which the reference may answer along with these
    occurrences: list[int]  # of `ids` and `ahead`; see `xpo.data.prompt_sets.tokenize_prompts`


@dataclass
class PairSampler:
    """Draws both completions of each prompt: the first from the policy, the second from `second`."""

    sampler: Sampler  # draws the policy's
    draws: ReferenceDraws  # draws the reference's, or finds them
    second: str  # "reference"; or "policy", another draw, independent of the first
    seed: int  # of the run
    device: torch.device  # where the models are
    gather: bool  # see `xpo.models.zero.sampling`

    def __call__(
        self, policy: PreTrainedModel, engine: nn.Module | None, step: StepPrompts, number: int, epoch: int
    ) -> tuple[PairBatch, Tensor]:
        """The pairs of a step, and which of the reference's completions it computed, (B,) or, without a store, (0,).

        Args:
            policy: unwrapped.
            engine: the ZeRO-3 engine around it, if there is one.
            step: its prompts.
            number: of the optimizer step.
            epoch: how often these prompts were drawn before.
        """
        own = [POLICY] if self.second == "reference" else [POLICY, SECOND]
        steps, ids = self.sampler.max_new_tokens, step.ids * len(own)
        noise = torch.cat([sampling_noise((self.seed, number, stream), step.rows, steps) for stream in own])
        with sampling(policy, engine, self.gather) as synced:
            drawn = self.sampler.sample(base_model(policy), ids, noise, self.device, synced=synced)
        if self.second == "reference":
            first = drawn
            second, computed = self.draws.draw(
                step.ids, self.seed, REFERENCE, epoch, self.device, ahead=step.ahead, occurrences=step.occurrences
            )
            fresh = computed[:0] if self.draws.store is None else computed
        else:
            first, second = map(self.sampler.completions, drawn.ids.split(len(step.ids)))
            fresh = torch.zeros(0, dtype=torch.bool)
        prompt_ids, prompt_mask = self.sampler.pad_prompts(step.ids, self.device)
        return PairBatch(prompt_ids, prompt_mask, *same_width(first, second, self.sampler.pad_token_id)), fresh
