"""Sums over per-sample gradients: in which precision, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "memory_order", "squared_norms"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


PIECE = 4096
"""Elements that are added up one after the other."""


def memory_order(t: Tensor) -> list[int]:
    """Axes after the first, in the order of memory: permuted like this, a dense tensor flattens to a view."""
    return sorted(range(1, t.ndim), key=t.stride, reverse=True)


def squared_norms(grads: Tensor) -> Tensor:
    """Squared norm `[N]` of each of `[N, *shape]`, in any memory order, accumulated in float32 at least.

    PyTorch's norm adds a row up in order, and over half a million elements in float32 comes out low by
    1e-4: a sample would stay unclipped by as much. Rows are added up in pieces, and the pieces pairwise.
    """
    rows = grads.permute(0, *memory_order(grads)).flatten(1)
    dtype = accumulation_dtype(rows.dtype)
    whole = rows.shape[1] // PIECE * PIECE
    if whole <= PIECE:
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
    pieces = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, PIECE)), dim=2, dtype=dtype)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype)
    return pieces.square().sum(1) + rest.square()
