"""Devices, and what computing on them needs of the process."""

import ctypes
import os
import platform

import torch

from xpo.config.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h
_NEVER, _AHEAD = 2**31 - 1, 2**29


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


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed instead of handing it back to the kernel; False without glibc.

    By default a large tensor is memory fresh from the kernel, which clears every page of it at its first use, again in
    each layer of each pass. An update of SmolLM2-135M on a CPU takes 9 % less time without that, and the
    process up to 8 % more memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_TOP_PAD, _AHEAD)])
