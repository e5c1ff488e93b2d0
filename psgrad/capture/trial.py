"""A trial run of a model, on samples of its batch, that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

__all__ = ["other_numbers_of_samples", "picked", "without_trace"]


def other_numbers_of_samples(
    args: Any, kwargs: Any, rows: int, rows_per_sample: int
) -> Iterator[tuple[Any, Any, int]]:
    """Make batches of two and of three samples, or of three and of four where the batch has two.

    Parameters
    ----------
    args, kwargs
        Any nesting of tensors and others. Tensors with N K > 0 rows in axis 0 are the batch.
    rows
        N K.
    rows_per_sample
        K.

    Yields
    ------
    tuple[Any, Any, int]
        args and kwargs with the first samples only (over again if there are too few), and their rows.

    """
    for samples in (3, 4) if rows == 2 * rows_per_sample else (2, 3):
        some = [n % rows for n in range(samples * rows_per_sample)]
        yield *picked((args, kwargs), rows, some), len(some)


def picked(call: Any, rows: int, some: list[int]) -> Any:
    """Take some rows of the batch; other tensors are copied, as the model may write to them."""

    def pick(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach()[some] if t.shape[:1] == (rows,) else t.clone()

    return tree_map(pick, call)


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Put back the state of the random number generators and the module's buffers afterwards.

    A `torch.utils.checkpoint` around it does not see what is saved for a backward pass inside.
    """
    buffers = [(b, b._version, b.clone()) for b in module.buffers()]
    devices = {p.device.index for p in module.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices), saved_tensors_hooks(Tensor.detach, _same):
            yield
    finally:
        with torch.no_grad():
            for b, version, before in buffers:
                if b._version != version:
                    b.copy_(before)


def _same(t: Tensor) -> Tensor:
    return t
