"""What a module or a function was called with, leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["leaves_in"]

PLAIN = (Tensor, bool, int, float, str, type(None))
"""What holds nothing: arguments are these, but for lists of tensors or of sizes."""


def leaves_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return what `tree_leaves((args, kwargs))` does, at a tenth of the price where none holds others."""
    values = [*args, *kwargs.values()]
    return values if all(isinstance(v, PLAIN) for v in values) else tree_leaves((args, kwargs))
