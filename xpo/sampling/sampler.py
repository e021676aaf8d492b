"""Drawing completions with transformers' generate.

Notation for shapes: B prompts, P prompt tokens (padded on the left), C completion tokens (padded on the right).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from xpo.config.errors import ConfigError, nearest
from xpo.config.options import SamplingOptions
from xpo.models.forward import eval_mode
from xpo.models.logprobs import completion_lengths, length_mask, positions
from xpo.sampling.completions import Completions, token_batches, tokens_at_once
from xpo.sampling.kv_cache import prefill, roomy_cache
from xpo.sampling.linears import packed_linears
from xpo.sampling.noise import InverseTransformSampler

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


def check_generation_kwargs(options: Mapping[str, Any]) -> None:
    """ConfigError for what is no option of GenerationConfig, or would change what a rollout is."""
    for key, value in options.items():
        if key in _REFUSED_OPTIONS:
            raise ConfigError(f"generation_kwargs: {key}={value!r} is not supported; {_REFUSED_OPTIONS[key]}")
        if key not in vars(GenerationConfig()):
            raise ConfigError(
                f"generation_kwargs: {key}={value!r} is no option of GenerationConfig"
                f"{nearest(key, vars(GenerationConfig()))}; correct or remove it"
            )


def warpers(options: SamplingOptions) -> LogitsProcessorList:
    """The transformations of the logits before a token is drawn, in transformers' order."""
    chosen = LogitsProcessorList()
    if options.temperature not in (0.0, 1.0):
        chosen.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        chosen.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        chosen.append(MinPLogitsWarper(options.min_p))
    return chosen


class Sampler:
    """Draws completions. One for a trainer; holds no model.

    Args:
        tokenizer: the policy's.
        options: how tokens are drawn; temperature 0 is greedy decoding.
        eos_token_ids: the tokens that end a completion.
        batch_size: at most so many prompts in one generate call; None: all at once.
        kwargs: further options of GenerationConfig.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        eos_token_ids: Sequence[int],
        batch_size: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.options = options
        self.eos_token_ids = list(eos_token_ids)
        self.batch_size = batch_size
        self.kwargs = dict(kwargs or {})
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
        return drawn | {"extra": self.kwargs, "batch_size": None}, self.eos_token_ids

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
        chunk = self.batch_size or len(prompts)
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
        if not greedy and self.options.temperature > 0:
            processors = warpers(self.options)
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
