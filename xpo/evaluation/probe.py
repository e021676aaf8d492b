"""Whether the policy explores: several completions of each of a few held-out prompts, beside the reference's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from xpo.models.batches import shares
from xpo.models.reference import base_model
from xpo.models.zero import sampling
from xpo.sampling.completions import Completions
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.noise import PROBE_POLICY, PROBE_REFERENCE, sampling_noise
from xpo.sampling.sampler import Sampler
from xpo.tracking.metrics import ngrams, novel_ngrams

MEASURES = ("exploration/unique", "exploration/novel_ngrams")


class Draw(NamedTuple):
    """One completion to draw."""

    place: int  # of its prompt in the data set
    ids: list[int]  # the prompt's tokens
    number: int  # of the draw among those of its prompt


@dataclass(eq=False)
class Probe:
    """Draws completions of a few prompts at training's temperature: the policy each time, the reference once.

    A draw depends on the run's seed, the prompt (for the policy, its place in the data set) and its number only.
    """

    sampler: Sampler  # draws the completions
    draws: ReferenceDraws  # the reference's
    prompts: int  # the first so many of a data set; of equal ones the first
    samples: int  # completions of each, by both models
    gather: bool = True  # see `xpo.models.zero.sampling`
    # The n-grams of the reference's completions by the prefix of a data set, and what these are the answer to.
    _known: dict[str, tuple[Any, set[tuple[int, ...]]]] = field(default_factory=dict, init=False)

    def __call__(
        self,
        policy: PreTrainedModel,
        rows: Sequence[dict[str, Any]],
        accelerator: Accelerator,
        args: TrainingArguments,
        prefix: str,
        engine: nn.Module | None = None,
    ) -> dict[str, float]:
        """The two of `MEASURES`, the same on every rank. Arguments as of `Evaluator`.

        exploration/unique: the mean share of different completions among those of a prompt, in tokens; 1 / samples if
        all are the same. exploration/novel_ngrams: the share of the policy's 4-grams of tokens, each counted once over
        all prompts, that the reference's completions of these prompts do not hold; NaN if it has none. Two sets of
        draws of one model differ too: how much, the evaluation before training tells.
        """
        wanted = self.wanted(rows)
        chunks, own = shares(len(wanted), args.eval_batch_size, args.process_index, args.world_size)
        batches = [[wanted[i] for i in chunk] for chunk in chunks]
        question, known = self._known.get(prefix, (None, set()))
        if question != (wanted, args.seed):
            tokens: list[list[int]] = []
            for number, batch in enumerate(batches):
                key, equal = (args.seed, PROBE_REFERENCE, 0), [draw.number for draw in batch]
                with accelerator.autocast():
                    drawn = self.draws.draw([draw.ids for draw in batch], *key, args.device, occurrences=equal)
                tokens += _tokens(drawn.completions) if number < own else []  # the others are company
            known = set(ngrams(gather_object(tokens)))
            self._known[prefix] = (wanted, args.seed), known
        said: list[tuple[int, list[int]]] = []
        for number, batch in enumerate(batches):
            steps = self.sampler.max_new_tokens
            noise = [sampling_noise((args.seed, draw.number, PROBE_POLICY), [draw.place], steps) for draw in batch]
            with accelerator.autocast(), sampling(policy, engine, self.gather) as synced:
                prompts, model = [draw.ids for draw in batch], base_model(policy)
                completions = self.sampler.sample(model, prompts, torch.cat(noise), args.device, synced=synced)
            if number < own:
                said += zip([draw.place for draw in batch], _tokens(completions), strict=True)
        return dict(zip(MEASURES, measured(gather_object(said), known), strict=True))

    def wanted(self, rows: Iterable[dict[str, Any]]) -> list[Draw]:
        """What is drawn of a data set: every prompt's completions, one prompt after the other."""
        different = [(place, row) for place, row in enumerate(rows) if not row.get("occurrence", 0)]
        return [
            Draw(place, row["prompt_ids"], number)
            for place, row in different[: self.prompts]
            for number in range(self.samples)
        ]


def _tokens(completions: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)]


def measured(said: Iterable[tuple[int, list[int]]], known: set[tuple[int, ...]]) -> tuple[float, float]:
    """`MEASURES` of completions, each with the place of its prompt, beside the reference's n-grams."""
    of_prompt: dict[int, list[tuple[int, ...]]] = {}
    for place, tokens in said:
        of_prompt.setdefault(place, []).append(tuple(tokens))
    unique = fmean(len(set(completions)) / len(completions) for _, completions in sorted(of_prompt.items()))
    novel = novel_ngrams([tokens for completions in of_prompt.values() for tokens in completions], known)
    return unique, novel.total / novel.count if novel.count else math.nan
