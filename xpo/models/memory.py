"""Memory of the process. Layer 0: the standard library only."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h
_NEVER, _AHEAD = 2**31 - 1, 2**29


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
