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


def memory_order(t: Tensor) -> tuple[list[int], list[int]]:
    """Axes that lie outside of the first one in memory, and the others, each from the outermost.

    A dense tensor, permuted to the ones, the first axis and the others, flattens around it to a view; but
    where the first axis is the innermost, nothing is said to lie outside.
    """
    ordered = sorted(range(1, t.ndim), key=t.stride, reverse=True)
    if t.shape[0] < 2 or t.stride(0) == 0:
        return [], ordered
    outside = [axis for axis in ordered if t.shape[axis] > 1 and t.stride(axis) > t.stride(0)]
    inside = [axis for axis in ordered if axis not in outside]
    return (outside, inside) if any(t.shape[axis] > 1 for axis in inside) else ([], ordered)


def squared_norms(grads: Tensor) -> Tensor:
    """Squared norm `[N]` of each of `[N, *shape]`, in any memory order, accumulated in float32 at least.

    PyTorch's norm adds a row up in order, and over half a million elements in float32 comes out low by
    1e-4: a sample would stay unclipped by as much. Rows are added up in pieces, and the pieces pairwise.
    """
    if grads.ndim == 1:  # of a scalar
        grads = grads.unsqueeze(1)
    if grads.is_contiguous():
        return _squared_norms_of_rows(grads.flatten(1))
    outside, inside = memory_order(grads)
    rows = grads.permute(*outside, 0, *inside).flatten(len(outside) + 1)
    norms = _squared_norms_of_rows(rows.flatten(0, len(outside)))
    return norms.view(-1, len(grads)).sum(0) if outside else norms


def _squared_norms_of_rows(rows: Tensor) -> Tensor:
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
    order = _Order(grads)
    rows, factors = order.rows(drop_removed(grads, factors)), factors.to(grads.dtype)
    if len(rows) == 1:
        return order.whole(factors @ rows[0])
    return order.whole(torch.stack([factors @ part for part in rows]))


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
        self._order: _Order | None = None

    def add(self, grads: Tensor, factors: Tensor) -> None:
        """Take some more: `[n, *shape]`, and `[n]` of their dtype."""
        self._order = self._order or _Order(grads)
        rows = self._order.rows(grads)
        wide = accumulation_dtype(self._dtype)
        if self._total is None:
            self._total = rows.new_zeros(len(rows), rows.shape[2], dtype=wide)
        for total, part in zip(self._total, rows, strict=True):
            if part.dtype == wide:
                total.addmv_(part.T, factors)  # a quarter of the time of a sum over axis 0, and an addition
            else:
                total.add_(factors @ part)

    def value(self) -> Tensor:
        """Return the sum `[*shape]`, contiguous, in the dtype asked for; at least one gradient was added."""
        assert self._total is not None
        assert self._order is not None
        return self._order.whole(self._total.to(self._dtype))


class _Order:
    """How gradients lie in memory, for sums over the samples that read them as they lie there."""

    def __init__(self, grads: Tensor) -> None:
        self._shape = grads.shape[1:]
        self._outside, self._inside = memory_order(grads)

    def rows(self, grads: Tensor) -> Tensor:
        """`[N, *shape]` as `[A, N, B]`, a view of dense ones in this order."""
        if grads.ndim == 1:  # of a scalar
            return grads[None, :, None]
        rows = grads.permute(*self._outside, 0, *self._inside).flatten(len(self._outside) + 1)
        return rows.flatten(0, -3) if self._outside else rows.unsqueeze(0)

    def whole(self, total: Tensor) -> Tensor:
        """`[A, B]`, or `[B]` if A is 1, as `[*shape]`, contiguous."""
        order = [*self._outside, *self._inside]
        total = total.view([self._shape[axis - 1] for axis in order])
        return total.permute([order.index(axis) for axis in range(1, len(order) + 1)]).contiguous()


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
