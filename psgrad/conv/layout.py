"""The layout verbs: moving, merging and splitting the vmapped axis.

`B` is the vmapped axis and `bdim` its position; `(BN)` is one merged axis, `B` outer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from psgrad.errors import ShapeError

__all__ = ["make_dummy", "move_batch_dim_to_front", "reshape_dim_into", "reshape_dim_outof"]


def _axis(position: int, ndim: int, what: str) -> int:
    if 0 <= position < ndim:
        return position
    if -ndim <= position < 0:
        return position + ndim
    raise ShapeError(f"{what} {position} is out of range for a tensor of {ndim} axes")


def move_batch_dim_to_front(t: Tensor, bdim: int | None) -> Tensor:
    """Return `t` with axis `bdim` first; `t` itself when it is not batched.

    Raises
    ------
    ShapeError
        If `bdim` is out of range.

    """
    if bdim is None:
        return t
    bdim = _axis(bdim, t.ndim, "bdim")
    return t if bdim == 0 else t.movedim(bdim, 0)


def reshape_dim_into(bdim: int, dim: int, t: Tensor) -> Tensor:
    """Move axis `bdim` in front of axis `dim` of the remaining axes and merge the two, `B` outer.

    `dim` counts the axes that are left when `bdim` is taken out: `BNI` with bdim 0 and dim 0 gives
    `(BN)I`, with dim 1 `N(BI)`.

    Raises
    ------
    ShapeError
        If `bdim` or `dim` is out of range.

    """
    ndim = t.ndim
    if not (0 <= bdim < ndim and 0 <= dim < ndim - 1):
        bdim, dim = _axis(bdim, ndim, "bdim"), _axis(dim, ndim - 1, "dim")
    if bdim != dim:
        t = t.movedim(bdim, dim)
    return t.flatten(dim, dim + 1)


def reshape_dim_outof(dim: int, size: int, t: Tensor) -> Tensor:
    """Split axis `dim` into `(size, rest)`.

    Raises
    ------
    ShapeError
        If the axis is not a multiple of `size`. A size of 0 needs an axis of length 0, and then
        `rest` is not determined: it is taken to be 0.

    """
    shape = list(t.shape)
    if not 0 <= dim < len(shape):
        dim = _axis(dim, len(shape), "dim")
    rest = shape[dim] // size if size else 0
    if rest * size != shape[dim]:
        raise ShapeError(f"axis {dim} of {tuple(shape)} does not split into {size} equal parts")
    shape[dim : dim + 1] = size, rest
    return t.view(shape)


def make_dummy(t: Tensor, bdim: int | None, dim: int, batch_size: int) -> Tensor:
    """Return a tensor of the unbatched shape of `t`, axis `dim` `batch_size` times as long.

    It stands where a backend wants a shape and must not read a value: one uninitialised element of
    storage, with a stride of 0 on every axis.
    """
    shape = list(t.shape)
    if bdim is not None:
        del shape[_axis(bdim, len(shape), "bdim")]
    shape[_axis(dim, len(shape), "dim")] *= batch_size
    strides = (0,) * len(shape)
    if is_functorch_wrapped_tensor(t):
        return torch.empty_strided(shape, strides, dtype=t.dtype, device=t.device)
    return t.new_empty_strided(shape, strides)  # the same, and takes half the time
