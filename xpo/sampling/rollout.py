"""Sampling for one optimizer step: a completion of every prompt from the policy and from the reference.

Notation for shapes: B pairs of the optimizer step on this rank, P prompt tokens (padded on the left),
C completion tokens (padded on the right), V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xpo.config.errors import ConfigError, nearest
from xpo.models.logprobs import completion_lengths, length_mask, positions
from xpo.sampling.kv_cache import prefill, roomy_cache
from xpo.sampling.linears import packed_linears

# The random streams: y, y~ and sampled labels never share their noise, nor training and evaluation.
POLICY, REFERENCE, EVAL_POLICY, EVAL_REFERENCE, LABEL = range(5)

# Options of GenerationConfig that would change what a rollout is: one sampled completion per prompt.
_REFUSED_OPTIONS = {
    "do_sample": "set temperature=0 for greedy decoding",
    "num_beams": "rollouts are sampled, not searched: remove it",
    "num_return_sequences": "a rollout is one completion per prompt: remove it",
    "typical_p": "use top_p, top_k or min_p",
    "epsilon_cutoff": "use top_p, top_k or min_p",
    "eta_cutoff": "use top_p, top_k or min_p",
    "top_h": "use top_p, top_k or min_p",
    "stop_strings": "completions end with an EOS token or at max_new_tokens: remove it",
    "return_dict_in_generate": "remove it",
    "eos_token_id": "set it in the tokenizer or in the model's generation_config",
    "pad_token_id": "set it in the tokenizer",
    "max_time": "a completion cut off by the clock cannot be drawn again: remove it",
    "max_length": "set the trainer's max_length and max_new_tokens instead",
}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The names are GenerationConfig's; temperature 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    extra: dict[str, Any] | None = None  # further GenerationConfig options
    batch_size: int | None = None  # at most so many prompts in one generate call; None: all at once

    def __post_init__(self) -> None:
        for key, value in (self.extra or {}).items():
            if key in _REFUSED_OPTIONS:
                raise ConfigError(f"generation_kwargs: {key}={value!r} is not supported; {_REFUSED_OPTIONS[key]}")
            if key not in vars(GenerationConfig()):
                raise ConfigError(
                    f"generation_kwargs: {key}={value!r} is no option of GenerationConfig"
                    f"{nearest(key, vars(GenerationConfig()))}; correct or remove it"
                )

    def warpers(self) -> LogitsProcessorList:
        """The transformations of the logits before a token is drawn, in transformers' order."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


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


@dataclass(frozen=True)
class Completions:
    """Completions of B prompts by one model.

    Attributes:
        ids: tokens up to and including the EOS, then padding, (B, C).
        mask: True on real tokens, (B, C).
        ended: whether the completion contains an EOS token, (B,).
        texts: decoded without special tokens, B strings.
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor
    texts: list[str]


@dataclass(frozen=True)
class Rollout:
    """The pairs of one optimizer step: prompts x, policy completions y, reference completions y~.

    Attributes:
        prompt_ids: left-padded, (B, P).
        prompt_mask: True on real tokens, (B, P).
        policy: y.
        reference: y~, padded to the same width as y.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    policy: Completions
    reference: Completions

    @property
    def tokens(self) -> Tensor:
        """Tokens of each pair: its prompt and both completions, (B,)."""
        return self.prompt_mask.sum(dim=1) + self.policy.mask.sum(dim=1) + self.reference.mask.sum(dim=1)

    def pairs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some rows, without the columns that are padding in all of them.

        Returns:
            prompt_ids and prompt_mask, (b, P); completion_ids and completion_mask, (2, b, C). Index 0 of
            the first dimension holds y, index 1 y~.
        """
        whole = {
            "prompt_ids": self.prompt_ids,
            "prompt_mask": self.prompt_mask,
            "completion_ids": torch.stack([self.policy.ids, self.reference.ids]),
            "completion_mask": torch.stack([self.policy.mask, self.reference.mask]),
        }
        return take_pairs(whole, rows)


# Where the pairs are in what a micro-batch holds: the second dimension of what there is once per completion.
_PAIR_DIMENSION = {"completion_ids": 1, "completion_mask": 1, "reference_logps": 1}


def take_pairs(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Some pairs of a micro-batch, without the columns that are padding in all of them."""
    index = torch.tensor(list(rows), device=batch["prompt_ids"].device)
    part = {name: values.index_select(_PAIR_DIMENSION.get(name, 0), index) for name, values in batch.items()}
    first_column = int(part["prompt_mask"].any(dim=0).int().argmax())
    width = int(part["completion_mask"].sum(dim=2).max())
    for name in ("prompt_ids", "prompt_mask"):
        part[name] = part[name][:, first_column:]
    for name in ("completion_ids", "completion_mask"):
        part[name] = part[name][..., :width]
    return part


def token_batches(lengths: Tensor, rows: Sequence[int], budget: int | None, packed: bool = False) -> list[list[int]]:
    """Rows of similar length together, as many as fit: the longest times their number is at most `budget`.

    Args:
        lengths: tokens of each row, (B,).
        rows: which of the B rows to batch.
        budget: tokens with padding; a row that is longer has a batch of its own. None: one batch.
        packed: there is no padding, so the sum of the lengths is at most `budget`.

    Returns:
        Batches of rows, the longest first.
    """
    length = lengths.tolist()
    batches: list[list[int]] = []
    for row in sorted(rows, key=length.__getitem__, reverse=True):
        batch = batches[-1] if batches else []
        more = [*batch, row]
        tokens = sum(length[i] for i in more) if packed else length[more[0]] * len(more)
        if batch and (budget is None or tokens <= budget):
            batch.append(row)
        else:
            batches.append([row])
    return batches


class Sampler:
    """Draws completions with transformers' generate. One for a trainer; holds no model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, eos_token_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = tokenizer.pad_token_id
        self.max_new_tokens = sampling.max_new_tokens
        self.config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # the last logits processor draws the token
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            **{"use_cache": True} | (sampling.extra or {}),
        )

    def pad_prompts(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Left-padded prompt tokens and their mask, (B, P) each."""
        rows = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows])
        return ids.to(device), length_mask(lengths, ids.shape[1]).flip(1).to(device)

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        device: torch.device,
        greedy: bool = False,
        synced: bool = False,
    ) -> Completions:
        """Completions of prompts, with the model in eval mode and its KV cache on.

        With `batch_size`, prompts of similar length share a generate call.

        Args:
            model: the policy or the reference, unwrapped.
            prompts: token ids of B prompts.
            noise: see `sampling_noise`, (B, max_new_tokens).
            device: where the model is.
            greedy: take the likeliest token instead of drawing one.
            synced: the model's parameters are divided among processes (ZeRO-3), which all sample equally many
                prompts and go on until the last of them is done.

        Returns:
            B completions of at most `max_new_tokens` tokens.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        chunk = self.sampling.batch_size or len(prompts)
        rows: list[Tensor] = [noise] * len(prompts)  # in the order of the prompts, once they are there
        for start in range(0, len(prompts), chunk):
            part = order[start : start + chunk]
            ids, mask = self.pad_prompts([prompts[i] for i in part], device)
            generated = self._generate(model, ids, mask, noise[part].to(device), greedy, synced)
            for i, row in zip(part, generated, strict=True):
                rows[i] = row
        return self.completions(pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id))

    def _generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        noise: Tensor,
        greedy: bool,
        synced: bool,
    ) -> Tensor:
        processors = LogitsProcessorList()
        if not greedy and self.sampling.temperature > 0:
            processors = self.sampling.warpers()
            processors.append(InverseTransformSampler(noise, prompt_ids.shape[1]))
        decoding = packed_linears(model, len(prompt_ids))
        with eval_mode(model), torch.no_grad(), own_generation_config(model, self.config), decoding:
            cache = None if synced else self._cache(model, prompt_ids, prompt_mask)
            sequences = model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask.long(),
                position_ids=positions(prompt_mask),
                generation_config=self.config,
                logits_processor=processors,
                synced_gpus=synced,
                **({} if cache is None else {"past_key_values": cache}),
            )
        return sequences[:, prompt_ids.shape[1] :]

    def _cache(self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> DynamicCache | None:
        """The KV cache to start from, which has the prompts if they are not computed in one batch."""
        if self.config.cache_implementation is not None or not self.config.use_cache:
            return None
        cache = roomy_cache(model, prompt_ids.shape[1] + self.max_new_tokens)
        lengths = prompt_mask.sum(dim=1)
        batches = token_batches(lengths, range(len(lengths)), tokens_at_once(prompt_ids.device))
        if cache is not None and len(batches) > 1:
            prefill(cache, model, prompt_ids, prompt_mask, batches)
        return cache

    def completions(self, ids: Tensor) -> Completions:
        """What generated tokens are, (B, C): where they end, and their texts. What stands behind an EOS is padding."""
        lengths, ended = completion_lengths(ids, torch.tensor(self.eos_token_ids, device=ids.device))
        mask = length_mask(lengths, ids.shape[1])
        texts = self.tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)], skip_special_tokens=True
        )
        return Completions(ids=ids, mask=mask, ended=ended, texts=texts)


def tokens_at_once(device: torch.device) -> int:
    """Tokens of a forward pass beyond which more in one pass no longer gain speed, and only cost padding."""
    return 1536 if device.type == "cpu" else 16_384


def pad_columns(ids: Tensor, width: int, value: int) -> Tensor:
    """`ids` (N, C) with columns of `value` appended up to `width`."""
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=value)


def same_width(first: Completions, second: Completions, pad_token_id: int) -> tuple[Completions, Completions]:
    """Two sets of completions padded to one width."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    return tuple(  # type: ignore[return-value]
        Completions(pad_columns(c.ids, width, pad_token_id), pad_columns(c.mask, width, 0), c.ended, c.texts)
        for c in (first, second)
    )


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode, put back into training mode afterwards if it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keeps the generation defaults that a checkpoint ships (top_k=20, a repetition penalty, ...) out.

    `generate` fills what a GenerationConfig leaves open from the model's own.
    """
    shipped = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = shipped
