"""Functions of a tensor whose axis 0 is the batch, that compute every row of the result from that row alone.

What is done with a parameter that has been expanded over the batch, on its way to the batch's rows: learned
queries are reshaped, dropped out, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from psgrad.capture.stand_in import functions_named, sizes_of

__all__ = ["is_row_by_row"]

ELEMENTWISE = functions_named(
    *(
        "abs",
        "clamp",
        "clone",
        "contiguous",
        "cos",
        "detach",
        "erf",
        "exp",
        "log",
        "neg",
        "pow",
        "rsqrt",
        "sin",
    ),
    *("__neg__", "__pow__", "relu", "sigmoid", "softplus", "sqrt", "square", "tanh"),
    *("bfloat16", "double", "float", "half", "to", "type", "type_as"),
    *("full_like", "ones_like", "zeros_like"),
) | {
    *(F.dropout, F.elu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu, F.relu6, F.selu),
    *(F.sigmoid, F.silu, F.softplus, F.tanh),
}
"""Every element from one; or from none, as `zeros_like`."""


def _axis(ndim: int, dim: int = 0, *_: Any, **__: Any) -> list[int]:
    return [dim % ndim]


def _new_axis(ndim: int, dim: int) -> list[int]:
    return [dim % (ndim + 1)]


def _second_argument(ndim: int, _: Any, dim: int = 0) -> list[int]:
    return [dim % ndim]


def _two_axes(ndim: int, dim0: int, dim1: int) -> list[int]:
    return [dim0 % ndim, dim1 % ndim]


def _order(ndim: int, *dims: Any) -> list[int]:
    order = sizes_of(dims)
    return [axis for axis, dim in enumerate(order) if axis != dim % ndim]


def _first_of(ndim: int, start_dim: int = 0, end_dim: int = -1) -> list[int]:
    return [start_dim % ndim]


def _index(ndim: int, index: Any) -> list[int]:
    first, *rest = index if isinstance(index, tuple) else (index,)
    kept = isinstance(first, slice) and first == slice(None)
    plain = all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in rest)
    return [] if kept and plain else [0]


_TOUCHED: dict[Any, Callable[..., Sequence[int]]] = {
    **dict.fromkeys(functions_named("unsqueeze"), _new_axis),
    **dict.fromkeys(functions_named("softmax", "squeeze", "unflatten") | {F.softmax}, _axis),
    **dict.fromkeys(functions_named("chunk", "split"), _second_argument),
    **dict.fromkeys(functions_named("swapaxes", "swapdims", "transpose"), _two_axes),
    **dict.fromkeys(functions_named("permute"), _order),
    **dict.fromkeys(functions_named("flatten"), _first_of),
    Tensor.__getitem__: _index,
}
"""By function: which axes it does something to, from the number of axes and the other arguments."""

_RESHAPES = functions_named("reshape", "view")


def is_row_by_row(func: Any, t: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function of t and other arguments than tensors keeps the rows of t, axis 0, apart."""
    if kwargs.get("inplace"):
        return False
    if func in ELEMENTWISE:
        return True
    if func in _RESHAPES:
        return not kwargs and sizes_of(tuple(args))[:1] == (t.shape[0],)
    try:
        return func in _TOUCHED and 0 not in _TOUCHED[func](t.ndim, *args, **kwargs)
    except TypeError:  # arguments in another form
        return False
