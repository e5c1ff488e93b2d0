"""A trial run of a model, on samples of its batch, that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Layout", "in_front", "layouts_of", "other_numbers_of_samples", "picked", "without_trace"]

Layout = Callable[[Tensor, int, bool], int | None]
"""The axis in which a tensor has the batch of so many rows, if any; of the first tensor, that tells it."""


def in_front(t: Tensor, rows: int, first: bool) -> int | None:
    """Axis 0, where it is as long as the batch."""
    return 0 if t.shape[:1] == (rows,) else None


def behind_layers(t: Tensor, rows: int, first: bool) -> int | None:
    """Axis 1 of what may be the state of a recurrent network, `[layers, N, features]`; else `in_front`."""
    state = not first and t.ndim == 3 and t.shape[1] == rows and t.is_floating_point()
    return 1 if state else in_front(t, rows, first)


def layouts_of(call: Any, rows: int) -> list[Layout]:
    """Return where the batch may be in the tensors of a call, the likeliest first."""
    tensors = [t for t in tree_leaves(call) if isinstance(t, Tensor) and t.ndim]
    behind = [t for t in tensors[1:] if behind_layers(t, rows, False) == 1]
    if not behind:
        return [in_front]
    sure = any(in_front(t, rows, False) is None for t in behind)
    return [behind_layers, in_front] if sure else [in_front, behind_layers]


def other_numbers_of_samples(
    args: Any, kwargs: Any, rows: int, rows_per_sample: int, layout: Layout = in_front
) -> Iterator[tuple[Any, Any, int]]:
    """Make batches of two and of three samples, or of more: never of two where the batch has two.

    Nor of as many as another tensor has rows in axis 0, a state its layers: it would pass for them.

    Parameters
    ----------
    args, kwargs
        Any nesting of tensors and others.
    rows
        N K > 0.
    rows_per_sample
        K.
    layout
        Where tensors have the batch.

    Yields
    ------
    tuple[Any, Any, int]
        args and kwargs with the first samples only (over again if there are too few), and their rows.

    """
    given = dict(zip(*_axes((args, kwargs), rows, layout), strict=True))
    taken = {t.shape[0] for t, axis in given.items() if t.ndim and axis != 0} | {2 * rows_per_sample} & {rows}
    numbers = (n for n in count(2) if n * rows_per_sample not in taken)
    for samples in islice(numbers, 2):
        some = [n % rows for n in range(samples * rows_per_sample)]
        yield *picked((args, kwargs), rows, some, layout), len(some)


def _axes(call: Any, rows: int, layout: Layout) -> tuple[list[Tensor], list[int | None]]:
    """Return the tensors of a call, and the axes in which they have the batch."""
    tensors = [t for t in tree_leaves(call) if isinstance(t, Tensor)]
    first = next((t for t in tensors if t.ndim), None)
    return tensors, [layout(t, rows, t is first) for t in tensors]


def picked(call: Any, rows: int, some: list[int], layout: Layout) -> Any:
    """Take some rows of the batch; other tensors are copied, as the model may write to them."""
    axes = iter(_axes(call, rows, layout)[1])

    def pick(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        axis = next(axes)
        return t.clone() if axis is None else t.detach().index_select(axis, index.to(t.device))

    index = torch.tensor(some, device="cpu")
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
