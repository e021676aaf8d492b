"""Drawing completions, with transformers' generate unless another engine is given.

Notation for shapes: B prompts, P prompt tokens (padded on the left), C completion tokens (padded on the right).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    BaseStreamer,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xpo.config.errors import ConfigError, nearest
from xpo.config.options import SamplingOptions
from xpo.data.prompts import Batch
from xpo.models.batches import batches_by_length, most, padded
from xpo.models.forward import eval_mode
from xpo.models.logprobs import completion_lengths, having, length_mask, positions
from xpo.sampling.completions import Completions, token_batches, tokens_at_once
from xpo.sampling.kv_cache import prefill, roomy_cache
from xpo.sampling.linears import decoding_linears
from xpo.sampling.noise import InverseTransformSampler

# Options of GenerationConfig that would change what a rollout is: one sampled completion per prompt.
_REFUSED_OPTIONS = {
    "do_sample": "set temperature=0 for greedy decoding",
    "num_beams": "rollouts are sampled, not searched: remove it",
    "num_return_sequences": "a rollout is one completion per prompt: remove it",
    **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), "use top_p, top_k or min_p"),
    "stop_strings": "completions end with an EOS token or at max_new_tokens: remove it",
    "return_dict_in_generate": "remove it",
    "eos_token_id": "set it in the tokenizer or in the model's generation_config",
    "pad_token_id": "set it in the tokenizer",
    "max_time": "a completion cut off by the clock cannot be drawn again: remove it",
    "max_length": "set the trainer's max_length and max_new_tokens instead",
}


def check_generation_kwargs(options: Mapping[str, Any], max_new_tokens: int) -> None:
    """ConfigError for what is no option of GenerationConfig, or would change what a rollout is."""
    known = vars(GenerationConfig())
    for key, value in options.items():
        given = f"generation_kwargs: {key}={value!r}"
        if key in _REFUSED_OPTIONS:
            raise ConfigError(f"{given} is not supported; {_REFUSED_OPTIONS[key]}")
        if key not in known:
            raise ConfigError(f"{given} is no option of GenerationConfig{nearest(key, known)}; correct or remove it")
        if key == "min_new_tokens" and not 0 <= (value or 0) <= max_new_tokens:
            raise ConfigError(f"{given} is not between 0 and max_new_tokens={max_new_tokens}; change one of them")


class _OnCPU(LogitsProcessor):
    """Another one, where CUDA's sums refuse to run (full_determinism)."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(input_ids.cpu(), scores.cpu()).to(scores.device)


def warpers(options: SamplingOptions) -> LogitsProcessorList:
    """The transformations of the logits before a token is drawn, in transformers' order."""
    chosen = LogitsProcessorList()
    if options.temperature not in (0.0, 1.0):
        chosen.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        nucleus = TopPLogitsWarper(options.top_p)
        chosen.append(_OnCPU(nucleus) if torch.are_deterministic_algorithms_enabled() else nucleus)
    if options.min_p is not None:
        chosen.append(MinPLogitsWarper(options.min_p))
    return chosen


class Engine(Protocol):
    """Decodes in transformers' place, which `Sampler` uses without one: `xpo.sampling.vllm.VLLM`.

    Attributes:
        name: which no other engine has: its draws are other ones.
    """

    name: str

    def draws_for(self, model: PreTrainedModel) -> bool:
        """Whether it can draw for this model."""

    def draw(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        device: torch.device,
        greedy: bool,
    ) -> list[Tensor]:
        """The tokens of a completion for each prompt, an EOS included; arguments as of `Sampler.sample`."""


class Sampler:
    """Draws completions. One for a trainer; holds no model.

    Args:
        tokenizer: the policy's.
        options: how tokens are drawn; temperature 0 is greedy decoding.
        eos_token_ids: the tokens that end a completion.
        batch_size: at most so many prompts in one generate call; None: all at once. Nothing to an engine.
        kwargs: further options of GenerationConfig.
        engine: what decodes instead of transformers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        eos_token_ids: Sequence[int],
        batch_size: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        engine: Engine | None = None,
    ):
        self.tokenizer = tokenizer
        self.options = options
        self.eos_token_ids = list(eos_token_ids)
        self.batch_size = batch_size
        self.kwargs = dict(kwargs or {})
        self.engine = engine
        self.pad_token_id = tokenizer.pad_token_id
        self.max_new_tokens = options.max_new_tokens
        self.config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,  # the last logits processor draws the token
            repetition_penalty=options.repetition_penalty,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            **{"use_cache": True} | self.kwargs,
        )

    @property
    def settings(self) -> tuple[dict[str, Any], list[int]]:
        """What its draws depend on besides model, prompt and noise; part of the keys of stored draws."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        drawn = {name: vars(self.options)[name] for name in names}
        by = {} if self.engine is None else {"engine": self.engine.name}
        return drawn | {"extra": self.kwargs, "batch_size": None} | by, self.eos_token_ids

    def pad_prompts(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Left-padded prompt tokens and their mask, (B, P) each."""
        ids, mask = padded(prompts, self.pad_token_id, side="left")
        return ids.to(device), mask.to(device)

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        device: torch.device,
        greedy: bool = False,
        synced: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> Completions:
        """Completions of prompts, with the model in eval mode and its KV cache on.

        With `batch_size`, prompts of similar length share a generate call.

        Args:
            model: the policy or the reference, unwrapped.
            prompts: token ids of B prompts.
            noise: see `sampling_noise`, (B, max_new_tokens).
            device: where the model is.
            greedy: take the likeliest token instead of drawing one.
            synced: the model's parameters are divided among processes (ZeRO-3), which all sample some prompts and go
                on until the last of them is done. Not with an engine, which needs the whole model.
            streamer: gets the tokens of a single prompt as they come. Not with an engine.

        Returns:
            B completions of at most `max_new_tokens` tokens.
        """
        if self.engine is not None:
            assert not synced
            assert streamer is None
            drawn = self.engine.draw(model, prompts, noise, device, greedy)
            return self.completions(pad_sequence(drawn, batch_first=True, padding_value=self.pad_token_id).to(device))
        rows: dict[int, Tensor] = {}
        chunk = self.batch_size or len(prompts)
        parts = list(batches_by_length([len(ids) for ids in prompts], chunk, longest_first=True))
        if synced:  # others may have a batch more, which needs this one's company
            parts += parts[-1:] * (most(len(parts), device) - len(parts))
        for part in parts:
            ids, mask = self.pad_prompts([prompts[i] for i in part], device)
            generated = self._generate(model, ids, mask, noise[part].to(device), greedy, synced, streamer)
            rows |= zip(part, generated, strict=True)
        in_order = [rows[i] for i in range(len(prompts))]
        return self.completions(pad_sequence(in_order, batch_first=True, padding_value=self.pad_token_id))

    def _generate(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        mask: Tensor,
        noise: Tensor,
        greedy: bool,
        synced: bool,
        streamer: BaseStreamer | None,
    ) -> Tensor:
        processors = LogitsProcessorList()
        if not greedy and self.options.temperature > 0:
            processors = warpers(self.options)
            processors.append(InverseTransformSampler(noise, ids.shape[1]))
        # A checkpoint ships defaults (top_k=20, say), which `generate` would take for what the config leaves open.
        own, decoding = having(model, "generation_config", self.config), decoding_linears(model, len(ids))
        with eval_mode(model), torch.no_grad(), own, decoding:
            sequences = model.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions(mask),
                past_key_values=None if synced else self._cache(model, ids, mask),
                generation_config=self.config,
                logits_processor=processors,
                synced_gpus=synced,
                streamer=streamer,
            )
        return sequences[:, ids.shape[1] :]

    def _cache(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> DynamicCache | None:
        """The KV cache to start from, which has the prompts if they are not computed in one batch."""
        if self.config.cache_implementation is not None or not self.config.use_cache:
            return None
        cache = roomy_cache(model, ids.shape[1] + self.max_new_tokens)
        batches = token_batches(mask.sum(dim=1), range(len(ids)), tokens_at_once(ids.device))
        if cache is not None and len(batches) > 1:
            prefill(cache, model, ids, mask, batches)
        return cache

    def completions(self, ids: Tensor) -> Completions:
        """What generated tokens are, (B, C): where they end, and their texts. What stands behind an EOS is padding."""
        lengths, ended = completion_lengths(ids, torch.tensor(self.eos_token_ids, device=ids.device))
        mask = length_mask(lengths, ids.shape[1])
        tokens = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return Completions(ids, mask, ended, Batch(texts, {"completion_ids": tokens}))
