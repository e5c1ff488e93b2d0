"""Sums over per-sample gradients: in which precision, and in which order."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from psgrad.conv.factors import remove_some

__all__ = [
    "RunningSum",
    "accumulation_dtype",
    "drop_removed",
    "memory_order",
    "per_row",
    "squared_norms",
    "weighted",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


PIECE = 4096
"""Elements that are added up one after the other, about."""
FEW = 2**14
"""Elements of all rows, up to which the call with the least around it is the fastest."""


def memory_order(t: Tensor) -> list[int]:
    """Axes after the first, in the order of memory: permuted like this, a dense tensor flattens to a view."""
    return sorted(range(1, t.ndim), key=t.stride, reverse=True)


def squared_norms(grads: Tensor) -> Tensor:
    """Squared norm `[N]` of each of `[N, *shape]`, in any memory order, accumulated in float32 at least.

    PyTorch's norm adds a row up in order, and over half a million elements in float32 comes out low by
    1e-4: a sample would stay unclipped by as much. Rows are added up in pieces, and the pieces pairwise.
    """
    rows = grads if grads.is_contiguous() else grads.permute(0, *memory_order(grads))
    rows = rows.flatten(1)
    dtype = accumulation_dtype(rows.dtype)
    if rows.numel() <= FEW and rows.dtype == dtype:
        return torch.linalg.vecdot(rows, rows)  # which adds up pairwise, with a copy of the products
    length = rows.shape[1]
    pieces = _pieces(length)
    if pieces == 1:
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
    alike = length - length % pieces
    norms = torch.linalg.vector_norm(rows[:, :alike].unflatten(1, (pieces, -1)), dim=2, dtype=dtype)
    if alike == length:
        return torch.linalg.vecdot(norms, norms)
    rest = torch.linalg.vector_norm(rows[:, alike:], dim=1, dtype=dtype)
    return torch.linalg.vecdot(norms, norms) + rest.square()


@lru_cache(maxsize=4096)
def _pieces(length: int) -> int:
    """Into how many pieces of about `PIECE` to cut a row; so that nothing is left over, if that can be."""
    about = max(1, -(-length // PIECE))
    return next((pieces for pieces in range(about, 2 * about) if length % pieces == 0), about)


def weighted(factors: Tensor, grads: Tensor) -> Tensor:
    """`sum_n factors[n] * grads[n]`: N, N.. -> ..; a factor of exactly 0 removes its sample."""
    ordered = drop_removed(grads, factors).permute(0, *(order := memory_order(grads)))
    total = (factors.to(grads.dtype) @ ordered.flatten(1)).view(ordered.shape[1:])
    return total.permute([order.index(axis) for axis in range(1, grads.ndim)]).contiguous()


class RunningSum:
    """`sum_n factors[n] * grads[n]`, of gradients that come a few at a time.

    Kept in float32 at least, in the order in which the first gradients lie in memory.

    Parameters
    ----------
    dtype
        Of the result.

    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._total: Tensor | None = None
        self._order: list[int] = []
        self._shape: torch.Size = torch.Size()

    def add(self, grads: Tensor, factors: Tensor) -> None:
        """Take some more: `[n, *shape]`, and `[n]` of their dtype."""
        self._order = self._order or memory_order(grads)
        ordered = grads.permute(0, *self._order)
        self._shape, rows = ordered.shape[1:], ordered.flatten(1)
        wide = accumulation_dtype(self._dtype)
        if self._total is None:
            self._total = rows.new_zeros(rows.shape[1], dtype=wide)
        if rows.dtype == wide:
            self._total.addmv_(rows.T, factors)  # a quarter of the time of a sum over axis 0, and an addition
        else:
            self._total.add_(factors @ rows)

    def value(self) -> Tensor:
        """Return the sum `[*shape]`, contiguous, in the dtype asked for; at least one gradient was added."""
        assert self._total is not None
        total = self._total.view(self._shape)
        total = total.permute([self._order.index(axis) for axis in range(1, len(self._order) + 1)])
        return total.to(self._dtype).contiguous()


def drop_removed(t: Tensor, factors: Tensor, rows_per_sample: int = 1) -> Tensor:
    """Put zeros in the rows of samples whose factor is 0: their values may be inf or NaN.

    Where there are none, t itself. On CUDA nobody looks, which would make the host wait.
    """
    if not remove_some(factors):
        return t
    removed = per_row(factors == 0, t, rows_per_sample).bool()
    return t.masked_fill(removed, 0)


def per_row(per_sample: Tensor, like: Tensor, rows_per_sample: int) -> Tensor:
    """`[N]` -> `[(N K), 1, ..]`, in the dtype and rank of `like`."""
    rows = per_sample.to(like.dtype)
    if rows_per_sample > 1:
        rows = rows.repeat_interleave(rows_per_sample)
    return rows.reshape(-1, *(1,) * (like.ndim - 1))
