"""Memory for per-sample gradients that are held for a while, the same in every training step.

On a CPU a block of some megabytes comes from the system with pages that were never touched, each of which
costs about as much at its first use as the arithmetic on it. Who holds gradients and then drops them all
lends the blocks out again. A GPU's allocator does the same by itself, and so does a process that keeps the
memory it frees (`psgrad.keep_freed_memory`): there nothing stays with the owner, of no use to forward.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from psgrad.conv.scratch import is_plain_cpu
from psgrad.freed_memory import freed_memory_is_kept

__all__ = ["Blocks", "borrowed"]

SMALLEST = 2**18
"""Bytes up to which the system's own memory is as good."""
MOST = 64 * 2**20
"""Bytes that stay between two steps."""
HEADROOM = 8
"""A new block has an eighth to spare, which costs nothing until it is touched: sampled batches vary."""


class _Current(threading.local):
    blocks: Blocks | None = None


_current = _Current()


class Blocks:
    """Blocks of memory of one owner, who holds all that they are lent for."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: list[Tensor] = []

    @contextmanager
    def lending(self) -> Iterator[None]:
        """What this thread takes by `borrowed` meanwhile is the owner's, until `take_back`."""
        before, _current.blocks = _current.blocks, self
        try:
            yield
        finally:
            _current.blocks = before

    def take_back(self) -> None:
        """Everything that was lent is not read any more. What nobody borrowed since the last time goes."""
        total, self._free = 0, []
        for block in self._lent if not freed_memory_is_kept() else ():
            total += block.nbytes
            if total <= MOST:
                self._free.append(block)
        self._lent = []

    def lend(self, size: int, like: Tensor) -> Tensor:
        """Return a block of at least `size` elements of the dtype of `like`."""
        fitting = [b for b in self._free if b.dtype == like.dtype and size <= b.numel() <= 2 * size]
        if fitting:
            block = min(fitting, key=Tensor.numel)
            self._free = [b for b in self._free if b is not block]
        else:
            block = like.new_empty(size + size // HEADROOM)
        self._lent.append(block)
        return block


def borrowed(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor: the lender's, if there is one, else a new one."""
    size = math.prod(shape)
    if _current.blocks is None or not is_plain_cpu(like) or size * like.dtype.itemsize <= SMALLEST:
        return like.new_empty(shape)
    return _current.blocks.lend(size, like)[:size].view(shape)
