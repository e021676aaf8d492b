"""Where a judge or a reward model computes. Layer 0: torch only."""

import os

import torch

from xpo.config.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_device(key: str, name: str | None) -> torch.device:
    """The device of a name; None is this process's GPU, or the CPU where there is none.

    Which GPU is a process's own is said by LOCAL_RANK: under torchrun a judge may be made before the trainer's
    configuration, which is what tells torch.

    Args:
        key: the config key that holds `name`, for the error message.
        name: "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: there is no such device.
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
    own = int(os.environ.get("LOCAL_RANK", 0)) % gpus
    return torch.device("cuda", own if device.index is None else device.index)
