"""Peak memory of one call, in this process."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["peak_bytes", "resident"]

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_bytes(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int | None]:
    """Call, and return the result and how many bytes the call added at its highest point.

    On a GPU: what PyTorch's allocator handed out. On Linux: the growth of the process's resident memory,
    its free blocks given back to the system before, so that the scratch space of the libraries counts as
    well; good to about a MiB. None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if not _forget_the_peak():
        return run(), None
    before = resident("VmRSS")
    result = run()
    return result, max(0, resident("VmHWM") - before)


def _forget_the_peak() -> bool:
    """Give free memory back and reset the high-water mark; False where that cannot be done."""
    try:
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or not allowed
        return False
    return True


def resident(field: str) -> int:
    """Bytes of resident memory of this process, on Linux: "VmRSS" now, "VmHWM" at most."""
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
