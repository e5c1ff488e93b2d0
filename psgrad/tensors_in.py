"""The tensors in what a model returns, also where they are fields of its own types."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

__all__ = ["tensors_in"]


def tensors_in(out: Any) -> list[Tensor]:
    """Return the tensors in nested containers, dataclasses and `torch.distributions`, in a fixed order.

    Of other types that `torch.utils._pytree` does not know nothing is seen.
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name, None) for field in fields(leaf)])
        elif isinstance(leaf, Distribution):
            found += tensors_in(list(vars(leaf).values()))
    return found
