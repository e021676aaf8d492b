"""The completions of an optimizer step: the policy's, and beside them another's or more of its own."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from xpo.data.prompts import Prompt
from xpo.models.iterates import PastPolicies
from xpo.models.reference import base_model
from xpo.models.zero import sampling
from xpo.sampling.completions import Completions, PairBatch, same_width
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.noise import CANDIDATES, ITERATE, POLICY, REFERENCE, SECOND, sampling_noise
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
    """Draws two completions of each prompt, or the n that two of are chosen from."""

    sampler: Sampler  # draws the policy's
    draws: ReferenceDraws  # draws the reference's, or finds them
    past: PastPolicies | None  # for "past" and "iterate"
    second: str  # who draws the second completion: SamplerOptions.second
    n: int  # completions of the policy for "best_of_n"
    seed: int  # of the run
    device: torch.device  # where the models are
    gather: bool  # see `xpo.models.zero.sampling`

    @property
    def number(self) -> int:
        """Completions that it draws of each prompt."""
        return self.n if self.second == "best_of_n" else 2

    def __call__(
        self, policy: PreTrainedModel, engine: nn.Module | None, step: StepPrompts, number: int, epoch: int
    ) -> tuple[list[Completions], Tensor]:
        """First and second completions, or n; and which of the reference's it computed, (B,) or, without a store, (0,).

        Args:
            policy: unwrapped.
            engine: the ZeRO-3 engine around it, if there is one.
            step: its prompts.
            number: of the optimizer step.
            epoch: how often these prompts were drawn before.
        """
        streams: list[tuple[int, ...]] = [(POLICY,)]
        if self.second == "policy":
            streams.append((SECOND,))
        if self.second == "best_of_n":
            streams = [(CANDIDATES, i) for i in range(self.n)]
        steps, ids = self.sampler.max_new_tokens, step.ids * len(streams)
        noise = torch.cat([sampling_noise((self.seed, number, *stream), step.rows, steps) for stream in streams])
        with sampling(policy, engine, self.gather) as synced:
            drawn = self.sampler.sample(base_model(policy), ids, noise, self.device, synced=synced)
        if self.second == "reference":
            second, computed = self.draws.draw(
                step.ids, self.seed, REFERENCE, epoch, self.device, ahead=step.ahead, occurrences=step.occurrences
            )
            return [drawn, second], computed[:0] if self.draws.store is None else computed
        nothing = torch.zeros(0, dtype=torch.bool)
        if self.past is not None:
            return [drawn, self._of_the_past(self.past, step, number)], nothing
        return [self.sampler.completions(part) for part in drawn.ids.split(len(step.ids))], nothing

    def _of_the_past(self, past: PastPolicies, step: StepPrompts, number: int) -> Completions:
        """Of each prompt a completion by one of the earlier policies, each as likely."""
        uniform = sampling_noise((self.seed, number, ITERATE), step.rows, 1)[:, 0]
        chosen = (uniform * len(past.policies)).long()
        noise = sampling_noise((self.seed, number, SECOND), step.rows, self.sampler.max_new_tokens)
        tokens: dict[int, Tensor] = {}
        for at, policy in enumerate(past):
            rows = (chosen == at).nonzero()[:, 0].tolist()
            with policy as model:  # even if nothing is drawn here: other processes may need this one
                if rows:
                    drawn = self.draws.sampler.sample(model, [step.ids[i] for i in rows], noise[rows], self.device)
                    tokens |= zip(rows, drawn.ids, strict=True)
        in_order = [tokens[i] for i in range(len(step.ids))]
        return self.sampler.completions(pad_sequence(in_order, True, self.sampler.pad_token_id))

    def pairs(self, step: StepPrompts, first: Completions, second: Completions) -> PairBatch:
        """The prompts of a step and two completions of each."""
        prompt_ids, prompt_mask = self.sampler.pad_prompts(step.ids, self.device)
        return PairBatch(prompt_ids, prompt_mask, *same_width(first, second, self.sampler.pad_token_id))
