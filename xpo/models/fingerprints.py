"""Short names for what a result depends on, so that stored results are found again and never mixed up."""

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel


def digest(*parts: object) -> str:
    """Names values by their representation: equal parts, equal digest."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def model_digest(model: PreTrainedModel, adapters: str | None = None) -> str:
    """Names what a model computes, wherever it came from: its class, configuration and weights (`weights_digest`)."""
    config = model.config.to_dict()
    for no_matter in ("_name_or_path", "transformers_version", "use_cache", "dtype"):  # the weights have their own
        config.pop(no_matter, None)
    return digest(type(model).__name__, sorted(config.items(), key=str), weights_digest(model, adapters))


def weights_digest(model: nn.Module, adapters: str | None = None) -> str:
    """Names the weights of a module: names, shapes and every bit; not those with `adapters` ("lora_") in their name."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if adapters is not None:
            if adapters in name:
                continue
            name = name.replace(".base_layer", "")  # where an adapter has wrapped a layer
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:32]
