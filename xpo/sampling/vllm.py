"""Drawing completions with vLLM, in this process.

The engine has weights of its own. Before each rollout it is sent those of the model that it draws for, the policy or
the reference, unless it has them.
"""

import copy
import importlib.util
import os
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from xpo.config.errors import ConfigError, first_line
from xpo.config.options import SamplingOptions
from xpo.models.forward import eval_mode

CHECKED = 2, 8  # prompts, and tokens of each, that a check compares
_PLAIN = {"temperature": 0.0, "logprobs": 0}  # the likeliest tokens, with their log-probabilities before any option
_CPU_MEMORY = "VLLM_CPU_KVCACHE_SPACE"  # GB
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
        ConfigError: it cannot be sent this policy's weights (`unmergeable`).
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
        obstacle = unmergeable(policy)
        if obstacle:
            raise ConfigError(f"generation_engine='vllm' {obstacle}, or {_OTHER}")
        self._config, self._likeness = merged_config(policy), likeness(policy)
        self._dtypes = policy.dtype, engine_options.dtype
        self._llm: Any = None
        self._sent: Tensor | None = None  # `state` of the model whose weights the engine has

    def draws_for(self, model: PreTrainedModel) -> bool:
        """Whether it can draw for this model: one of the policy's configuration, as precise."""
        return likeness(model) == self._likeness and model.dtype in self._dtypes and not unmergeable(model)

    def draw(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        device: torch.device,
        greedy: bool,
    ) -> list[Tensor]:
        """See `xpo.sampling.sampler.Engine`.

        Raises:
            ConfigError: the engine's weights are found not to be the model's, or a completion has no room.
        """
        options, longest = self.options, max(map(len, prompts))
        if longest + options.max_new_tokens > self.engine_options.max_length:  # vLLM would end it sooner
            raise ConfigError(
                f"a prompt of {longest} tokens leaves no room for max_new_tokens={options.max_new_tokens} in "
                f"max_length={self.engine_options.max_length}; shorten it, or raise max_length"
            )
        how = {
            "temperature": 0.0 if greedy else options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p or 0.0,
            "repetition_penalty": options.repetition_penalty,
            **{_KNOWN[key]: value for key, value in self.kwargs.items()},
        }
        seeds = (noise[:, 0] * 2**53).long().tolist()
        # The engine has a dtype of its own.
        with torch.autocast(device.type, enabled=False), kept_random_states(device):
            self._follow(model)
            every = self.engine_options.check_steps
            if every is not None and self.rollouts % every < 2:  # at first the policy's, then the reference's
                self._check(model, prompts[: CHECKED[0]], device)
            self.rollouts += 1
            drawn = self._generate(prompts, options.max_new_tokens, seeds, **how)
            if self._sleeps:
                self._llm.sleep(level=1)
        return [torch.tensor(one.token_ids) for one in drawn]

    def _generate(self, prompts: Sequence[Sequence[int]], tokens: int, seeds: Sequence[int], **how: Any) -> list[Any]:
        """vLLM's CompletionOutput of each prompt."""
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
        return [one.outputs[0] for one in self._llm.generate(asked, params, use_tqdm=False)]

    @property
    def _sleeps(self) -> bool:
        return self.engine_options.sleep and not on_cpu()

    def _follow(self, model: PreTrainedModel) -> None:
        """The engine awake, with the model's weights."""
        if self._llm is None:
            self._llm = start(self._config, self.engine_options)
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
        """ConfigError unless the engine's likeliest tokens have the model's log-probabilities, up to rounding."""
        tolerance = 1e-3 if self.engine_options.dtype == torch.float32 else 0.2
        tokens = min(CHECKED[1], self.options.max_new_tokens)
        off = []
        for prompt, answer in zip(prompts, self._generate(prompts, tokens, [0] * len(prompts), **_PLAIN), strict=True):
            ids = torch.tensor([[*prompt, *answer.token_ids]], device=device)
            with eval_mode(model), torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logps = logits.log_softmax(1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
            theirs = [one[token].logprob for one, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            off += [abs(one - other) for one, other in zip(logps, theirs, strict=True)]
        if not fmean(off) <= tolerance:  # nor if it is NaN
            raise ConfigError(
                "generation_engine='vllm' has other weights than the model: the log-probabilities of its likeliest "
                f"tokens differ by {fmean(off):.2g} nats; {_OTHER}, and report it"
            )


def check_vllm(kwargs: Mapping[str, Any]) -> None:
    """ConfigError where vLLM cannot draw: it is not installed, or does not know an option of generation_kwargs."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"generation_engine='vllm' is not installed; install it (docs/vllm.md), or {_OTHER}")
    for key, value in kwargs.items():
        if key not in _KNOWN:
            raise ConfigError(f"generation_kwargs: {key}={value!r} is not known to vLLM; leave it out, or {_OTHER}")


def on_cpu() -> bool:
    """Whether the vLLM that is installed here computes on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def start(config: PretrainedConfig, options: EngineOptions) -> Any:
    """An engine for models of this configuration, whose weights are still to come."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer needs the cores, too
    os.environ.setdefault(_CPU_MEMORY, "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    memory = f"vllm_gpu_memory_utilization={options.memory} (generation.vllm_memory)"
    try:
        from vllm import LLM

        if on_cpu():
            memory = f"the variable {_CPU_MEMORY}={os.environ[_CPU_MEMORY]} (GB)"
        with tempfile.TemporaryDirectory() as directory:
            config.save_pretrained(directory)
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
                enable_sleep_mode=options.sleep and not on_cpu(),
                # On a CPU vLLM 0.32 fails at a prompt in two parts: it sets back the generator of a seeded request.
                enable_chunked_prefill=not on_cpu(),
                disable_log_stats=True,
            )
    except Exception as error:  # of any kind, according to what vLLM cannot do here
        raise ConfigError(
            f"generation_engine='vllm' does not start ({first_line(error)}); if memory is lacking, change {memory}; "
            f"else {_OTHER}"
        ) from error


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """The generators of the process are as before: vLLM seeds them at its start, and draws from them.

    Else a resumed run, whose engine starts late, would have other dropout than the uninterrupted one.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def unmergeable(model: PreTrainedModel) -> str:
    """What of a model `merged_weights` cannot send, with a remedy: quantised layers, adapters of other kinds; or ""."""
    if "quantization_config" in model.config.to_dict():
        return "takes no quantised policy; load it whole"
    for name, part in model.named_modules():
        is_known = (
            isinstance(part, LoraLayer)
            and not isinstance(part, ParamWrapper)  # several adapters, one inside the other
            and not any(part.lora_bias.values())
            and all(isinstance(variant, DoraLinearVariant) for variant in part.lora_variant.values())
        )
        if isinstance(part, BaseTunerLayer) and not is_known:
            kind = type(part).__name__
            return f"knows LoRA and DoRA of layers, without lora_bias, not the {kind} at {name}; use these"
    return ""


def likeness(model: PreTrainedModel) -> dict[str, Any]:
    """What two models have in common if one engine can draw for both."""
    return {
        key: value
        for key, value in merged_config(model).to_dict().items()
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
