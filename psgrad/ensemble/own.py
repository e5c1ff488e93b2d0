"""A member's part of data that has the member axis in front."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["holds_tensors", "part_of"]


def part_of(tree: Any, k: int) -> Any:
    """Return `value[k]` of every tensor of a tree; what is no tensor is every member's."""
    if isinstance(tree, Tensor):
        return tree[k]
    return tree_map(lambda value: value[k] if isinstance(value, Tensor) else value, tree)


def holds_tensors(leaf: Any) -> bool:
    """Whether a leaf of a tree is no tensor and has some in attributes, where `part_of` does not reach."""
    held = None if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", None)
    return any(isinstance(value, Tensor) for value in tree_leaves(held))
