"""Which of a module's results have no batch in axis 0: not the shape of those of one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psgrad.capture.swap import swapped

__all__ = ["shapes_as_it_is", "without_batch"]


def shapes_as_it_is(
    module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> list[torch.Size]:
    """Run `forward` on copies of its inputs, with its own parameters; return its results' shapes."""
    args, kwargs = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (args, kwargs))
    with swapped(module.modules(), lambda p: p):
        return [t.shape for t in tree_leaves(forward(*args, **kwargs)) if isinstance(t, Tensor)]


def without_batch(shapes: list[torch.Size], out: Any) -> dict[int, torch.Size]:
    """Return the shapes, by their position, that are not those of `out`, the results of one sample at a time.

    But not `[1, .., ..]` where there is one for every row: what it is broadcast to takes both.
    """
    found = [t.shape for t in tree_leaves(out) if isinstance(t, Tensor)]

    def differs(whole: torch.Size, own: torch.Size) -> bool:
        shared = len(whole) > 2 and whole[0] == 1 and whole[1:] == own[1:]
        return whole != own and not shared

    return {i: shape for i, shape in enumerate(shapes) if differs(shape, found[i])}
