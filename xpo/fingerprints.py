"""Short names for what a result depends on, so that stored results are found again and never mixed up."""

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel


def digest(*parts: object) -> str:
    """Names values by their representation: equal parts, equal digest."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def model_digest(model: PreTrainedModel) -> str:
    """Names what a model computes, wherever it came from: its class, configuration and weights."""
    config = model.config.to_dict()
    for where_from in ("_name_or_path", "transformers_version"):
        config.pop(where_from, None)
    return digest(type(model).__name__, sorted(config.items(), key=str), weights_digest(model))


def weights_digest(model: nn.Module) -> str:
    """Names the weights of a module: names, shapes and every bit."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:32]
