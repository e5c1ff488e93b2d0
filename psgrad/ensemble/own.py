"""A member's part of data that has the member axis in front."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["part_of"]


def part_of(tree: Any, k: int) -> Any:
    """Return `value[k]` of every tensor of a tree; what is no tensor is every member's."""
    if isinstance(tree, Tensor):
        return tree[k]
    return tree_map(lambda value: value[k] if isinstance(value, Tensor) else value, tree)
