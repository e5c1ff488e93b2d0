"""Memory for temporaries that a CPU does not have to hand out anew at every call.

A block of some megabytes comes from the system with pages that were never touched, each of which costs
about two microseconds at its first use: of an unfolded copy that is more than the copying. One block for
each purpose stays, of each thread; a GPU's allocator does the same by itself.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

__all__ = ["is_plain_cpu", "is_traced", "scratch", "scratch_like"]

LARGEST = 4 * 2**20
"""Bytes of the largest block that stays."""


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.by_purpose: dict[tuple[str, torch.dtype], Tensor] = {}


_blocks = _Blocks()


def scratch(purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor, good until the next call for the same purpose.

    Parameters
    ----------
    purpose
        What for: two tensors that are alive at once have two purposes.
    shape
        Any.
    like
        Tells dtype and device. Beyond `LARGEST` bytes, on a GPU, and where `like` is no plain tensor
        (under vmap, say), the tensor is a new one.

    """
    size = math.prod(shape)
    if not is_plain_cpu(like) or size * like.dtype.itemsize > LARGEST:
        return like.new_empty(shape)
    blocks = _blocks.by_purpose
    block = blocks.get((purpose, like.dtype))
    if block is None or block.numel() < size:
        with torch.inference_mode(False):  # it outlives the mode, and whatever device is the default
            block = blocks[purpose, like.dtype] = torch.empty(size, dtype=like.dtype, device="cpu")
    return block[:size].view(shape)


def is_plain_cpu(t: Tensor) -> bool:
    """Whether t is a tensor in a CPU's memory and nothing else, as it would be under vmap or in a graph."""
    wrapped = type(t) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(t)
    return not wrapped and t.device.type == "cpu" and not is_traced()


def is_traced() -> bool:
    """Whether a dispatch mode is on, which may be making a graph that other tensors will run through."""
    return torch._C._len_torch_dispatch_stack() > 0


def scratch_like(purpose: str, like: Tensor) -> Tensor:
    """Return an uninitialised tensor of the shape and, where it is dense, the memory layout of `like`."""
    if like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last):
        return scratch(purpose, tuple(like.shape), like)
    rows, channels, *spatial = like.shape
    return scratch(purpose, (rows, *spatial, channels), like).movedim(-1, 1)
