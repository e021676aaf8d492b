"""Where a judge or a reward model computes. Layer 0: torch only."""

import os

import torch

from xpo.config.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_device(key: str, name: str | None) -> torch.device:
    """The device of a name: "cpu", "cuda" or "cuda:1"; None is this process's GPU, or the CPU where there is none.

    Raises:
        ConfigError: there is no such device; names the configuration's `key`.
    """
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"{key}={name!r} is no torch device; give cpu, cuda, cuda:1 or null") from error
    if device.type != "cuda":
        return device
    if (device.index or 0) >= gpus:
        raise ConfigError(f"{key}={name!r}, but torch sees {gpus} GPUs; give cpu or null")
    if device.index is not None:
        return device
    # Not from torch: under torchrun a judge may be made before the trainer's configuration, which is what tells it.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
