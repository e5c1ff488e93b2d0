"""A trial run of a model, on some samples of its batch, that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

__all__ = ["other_number_of_samples", "without_trace"]


def other_number_of_samples(inputs: Any, rows: int, rows_per_sample: int) -> tuple[Any, int]:
    """Make a batch of two samples, or of three where the batch has two.

    Parameters
    ----------
    inputs
        Any nesting of tensors and others. Tensors with N K > 0 rows in axis 0 are the batch.
    rows
        N K.
    rows_per_sample
        K.

    Returns
    -------
    tuple[Any, int]
        The inputs with the first samples only (over again if there are too few), and their rows.

    """
    samples = 3 if rows == 2 * rows_per_sample else 2
    some = torch.arange(samples * rows_per_sample) % rows

    def pick(t: Any) -> Any:
        is_batch = isinstance(t, Tensor) and t.shape[:1] == (rows,)
        return t.detach()[some.to(t.device)] if is_batch else t

    return tree_map(pick, inputs), len(some)


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
