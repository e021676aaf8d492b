"""DeepSpeed ZeRO under the Trainer: start-up, whole models for generation, and proof that it is in force.

Everything here does nothing without DeepSpeed, and most of it nothing below ZeRO-3, where each process holds a
part of every parameter only. transformers and DeepSpeed know the configuration in force through a global
variable, which also decides how `from_pretrained` loads: only the policy may see it.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils.other import get_free_port
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration

from xpo.models.hub import package_directory
from xpo.models.logprobs import having


def prepare_environment(use_cpu: bool) -> None:
    """What must be settled before DeepSpeed is imported; ConfigError if it is not installed."""
    package_directory("deepspeed=...", "deepspeed", "pip install deepspeed")
    if use_cpu:
        import deepspeed.ops

        # Otherwise it compiles, for minutes, a kernel for shared memory that training does not use.
        deepspeed.ops.__compatible_ops__ = {}
    if "RANK" not in os.environ:  # without a launcher it would ask MPI
        port = str(get_free_port())
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def connect(device: torch.device) -> None:
    """DeepSpeed's own view of the process group, which must be there before a model loads in parts."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else None, verbose=False)


@contextmanager
def loading_whole() -> Iterator[None]:
    """Within, `from_pretrained` loads whole models on every process: judges, reward models, the reference."""
    with having(integration, "_hf_deepspeed_config_weak_ref", None):
        yield


def is_divided(model: nn.Module) -> bool:
    """Whether this process holds parts of parameters only."""
    return any("ds_id" in vars(parameter) for parameter in model.parameters())


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole parameter, of which this process may hold a part."""
    return vars(parameter).get("ds_shape", parameter.shape)


@contextmanager
def gathered(model: nn.Module, engine: nn.Module | None = None) -> Iterator[None]:
    """Within, the whole model is on every process and computes without talking to others.

    Every process of the group must enter. Changes of parameters are lost.

    Args:
        model: unwrapped.
        engine: the ZeRO-3 engine around it, if there is one: its hooks, which fetch and drop the
            parameters layer by layer, rest meanwhile.
    """
    if not is_divided(model):
        yield
        return
    import deepspeed

    parameters = list(model.parameters())
    offload: Any = None if engine is None else vars(engine)["optimizer"].parameter_offload
    if offload is not None:
        for parameter in parameters:
            vars(parameter)["ds_active_sub_modules"].clear()
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with deepspeed.zero.GatheredParameters(parameters):
            yield
    finally:
        if offload is not None:
            offload.setup_zero_stage3_hooks()


@contextmanager
def overwriting(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Within, its whole parameters by name, which keep what every process alike writes into them."""
    parameters = dict(model.named_parameters())
    if not is_divided(model):
        yield parameters
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        yield parameters


@contextmanager
def sampling(model: nn.Module, engine: nn.Module | None, gather: bool) -> Iterator[bool]:
    """Within, the policy can be sampled from; yields whether all processes must do so in step.

    Args:
        model, engine: see `gathered`.
        gather: bring the whole model together, where it is divided; False leaves that to the engine, layer by layer.
    """
    in_step = engine is not None and not gather
    with nullcontext() if in_step else gathered(model, engine):
        yield in_step


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A whole copy of a model on every process."""
    if not is_divided(model):
        return copy.deepcopy(model)
    with loading_whole(), torch.device("meta"):
        whole = type(model)._from_config(model.config, dtype=model.dtype)
    with gathered(model):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    for name, value in buffers.items():  # those that no state dict holds, such as rotary frequencies
        owner, _, last = name.rpartition(".")
        whole.get_submodule(owner)._buffers[last] = value
    return whole


def divide(model: nn.Module, config: dict[str, Any]) -> None:
    """Leaves each process its part of every parameter; `gathered` brings the whole model back."""
    import deepspeed

    stage3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    if "bf16" in config:
        stage3["bf16"] = config["bf16"]
    deepspeed.zero.Init(module=model, config_dict_or_path=stage3, dtype=next(model.parameters()).dtype)


def check_engine(engine: nn.Module, config: dict[str, Any], processes: int) -> None:
    """RuntimeError unless the DeepSpeed engine in force is the one that was asked for.

    A wrong launcher or environment variable leaves plain AdamW on one process, silently.
    """
    from deepspeed import DeepSpeedEngine

    stage = config.get("zero_optimization", {}).get("stage", 0)
    asked = f"DeepSpeed ZeRO-{stage} on {processes} processes"
    if not isinstance(engine, DeepSpeedEngine):
        raise RuntimeError(f"{asked} was asked for and {type(engine).__name__} is in force; launch with torchrun")
    found = engine.zero_optimization_stage(), engine.dp_world_size
    if found != (stage, processes) or (stage and "Zero" not in type(engine.optimizer).__name__):
        raise RuntimeError(
            f"{asked} was asked for; in force is ZeRO-{found[0]} on {found[1]} processes with "
            f"{type(engine.optimizer).__name__}; launch with torchrun"
        )
