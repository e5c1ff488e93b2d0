"""Memory that a training step frees, kept for the next step instead of given back to the system."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["freed_memory_is_kept", "keep_freed_memory"]

# Parameters of glibc's mallopt, of <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

NEVER = 2**31 - 1
"""Free bytes at the end of the heap from where on they are given back: the most that an int can say."""
LARGEST = 2**30
"""Bytes of a block from where on it is the system's own again when it is freed."""
AT_ONCE = 64 * 2**20
"""Bytes that the heap asks the system for beyond what it needs."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, to be used again: training on a CPU gets faster.

    A training step frees its activations and gradients and asks for as much again in the next one. glibc
    gives large blocks back to the system, and each of their pages costs a fault when it is touched again,
    which may take longer than the arithmetic on it. This makes the three settings of `mallopt` that end that.
    They hold for the whole process, whoever allocates, until it ends: what it took at its peak, it keeps.
    Plain training gains as well as training with psgrad; memory of a GPU is not concerned.

    Call it at the beginning. Twice is as good as once.

    Returns
    -------
    bool
        Whether it was done: False where the C library is not glibc (macOS, Windows, musl), or refuses. Where
        another allocator is preloaded (jemalloc, tcmalloc), the call changes nothing, and nothing has to be.

    """
    global _kept
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_MMAP_THRESHOLD, LARGEST),
        (_M_TRIM_THRESHOLD, NEVER),
        (_M_TOP_PAD, AT_ONCE),
    )
    _kept = all(mallopt(name, value) == 1 for name, value in settings)
    return _kept


_kept = False


def freed_memory_is_kept() -> bool:
    """Whether `keep_freed_memory` was called in this process, and done."""
    return _kept
