"""What a module returns as it is, and which of it has no batch in axis 0: not the shape of samples alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psgrad.capture.swap import swapped

__all__ = ["results_as_it_is", "with_batch", "without_batch"]


def results_as_it_is(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
    """Run `forward` on copies of its inputs, with its own parameters; return the tensors of its results."""
    args, kwargs = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (args, kwargs))
    with swapped(module.modules(), lambda p: p):
        return [t.detach() for t in tree_leaves(forward(*args, **kwargs)) if isinstance(t, Tensor)]


def without_batch(results: Sequence[Tensor], out: Any) -> dict[int, torch.Size]:
    """Return shapes, by position, that are not those of `out`, what comes of one sample at a time.

    But not `[1, .., ..]` where there is one for every row: what it is broadcast to takes both.
    """

    def differs(whole: torch.Size, own: torch.Size) -> bool:
        shared = len(whole) > 2 and whole[0] == 1 and whole[1:] == own[1:]
        return whole != own and not shared

    pairs = enumerate(zip(results, _tensors(out), strict=True))
    return {i: whole.shape for i, (whole, own) in pairs if differs(whole.shape, own.shape)}


def with_batch(results: Sequence[Tensor], out: Any) -> list[Tensor]:
    """Return those that have the shapes of `out`, what comes of one sample at a time."""
    return [whole for whole, own in zip(results, _tensors(out), strict=True) if whole.shape == own.shape]


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]
