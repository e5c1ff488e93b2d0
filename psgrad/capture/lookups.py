"""Rows of a parameter that the batch looks up by index, in terms of an embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psgrad.capture.stand_in import StandIn

__all__ = ["LOOKUPS"]


def _indexed(table: Any, index: Any) -> Any:
    """`V.., N.. -> N....`.

    Raises
    ------
    ValueError
        If it is indexed by something else than whole numbers, in another axis, or is none.

    """
    whole = type(index) is Tensor and index.dtype in (torch.int64, torch.int32)
    if not whole or not isinstance(table, StandIn):
        raise ValueError("a parameter indexed by another thing than a tensor of whole numbers")
    entries = len(table)
    rows = table if table.ndim == 2 else table.reshape(entries, -1)
    looked_up = F.embedding(torch.where(index < 0, index + entries, index), rows)
    return looked_up.reshape(*index.shape, *table.shape[1:])


def _index_select(table: Any, dim: int, index: Any) -> Any:
    if dim != 0:
        raise ValueError("a parameter indexed in another axis than 0")
    return _indexed(table, index)


LOOKUPS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    torch.index_select: _index_select,
    Tensor.index_select: _index_select,
}
"""By torch's function, where no layer takes its arguments as they are."""
