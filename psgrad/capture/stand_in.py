"""What a module sees in a parameter's place, and the functions that torch may be called for with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from psgrad.capture.leaves import leaves_in
from psgrad.errors import CaptureError

if TYPE_CHECKING:
    from psgrad.capture.direct import Direct
    from psgrad.capture.survey import Layer

__all__ = [
    "BROADCAST",
    "EXPANSIONS",
    "IN_PLACE",
    "JOINS",
    "REARRANGING",
    "StandIn",
    "functions_named",
    "has_value",
    "named",
    "sizes_of",
    "with_rows",
    "writes",
]


class StandIn(Tensor):
    """What a module sees in a parameter's place; it has no values.

    Attributes
    ----------
    run
        Whose it is.
    value
        What it stands in for: a parameter, or a tensor of the shape of what was computed of parameters alone.
    rows
        None for the value as it is; or, once expanded over the batch, the batch's copies `[(N K), ..]`.
    source
        The layer that gave it, or what it was computed of; None if a parameter did.

    """

    run: Direct
    value: Tensor
    rows: Tensor | None
    source: Layer | None

    @staticmethod
    def of(run: Direct, value: Tensor, rows: Tensor | None = None, source: Layer | None = None) -> StandIn:
        """Make one."""
        like = value if rows is None else rows
        made = Tensor._make_wrapper_subclass(
            StandIn, like.shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made.run, made.value, made.rows, made.source = run, value, rows, source
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        stand_in = next(t for t in leaves_in(args, kwargs) if isinstance(t, StandIn))
        with torch._C.DisableTorchFunctionSubclass():
            run = stand_in.run
        return run.use(stand_in, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it static
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise CaptureError(f"{func} got a parameter's stand-in")


def with_rows(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a call's arguments with the batch's copies in place of what has been expanded over it."""
    if not any(isinstance(t, StandIn) for t in leaves_in(args, kwargs)):
        return args, kwargs
    found: tuple[Any, Any] = tree_map_only(StandIn, lambda t: t if t.rows is None else t.rows, (args, kwargs))
    return found


def has_value(args: Any, kwargs: Any) -> bool:
    """Whether a call is given a stand-in that has not been expanded over the batch."""
    return any(isinstance(t, StandIn) and t.rows is None for t in leaves_in(args, kwargs))


def named(func: Any) -> str:
    """Return a function's name, for messages."""
    return getattr(func, "__name__", str(func))


def writes(func: Any, kwargs: Any) -> bool:
    """Whether a function writes to what it is given, by its name as torch has them."""
    name = named(func)
    return "out" in kwargs or name.startswith(("__i", "__set")) or name[-1] == "_" != name[-2:-1]


def sizes_of(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the sizes that `expand`, `expand_as` or `repeat` was given, in any of their forms."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list | Tensor):
        return tuple(sizes[0].shape if isinstance(sizes[0], Tensor) else sizes[0])
    return sizes


def functions_named(*names: str) -> frozenset[Any]:
    """Return torch's functions and tensors' methods of these names."""
    found = [getattr(owner, name, None) for owner in (torch, Tensor) for name in names]
    return frozenset(f for f in found if f is not None)


ABOUT = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "layout", "is_leaf")),
        *functions_named("size", "dim", "numel", "is_floating_point", "__len__"),
    }
)
"""What asks about a parameter, but not for its values."""

IN_PLACE = functions_named("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
BROADCAST = IN_PLACE | functions_named(
    *("add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
)
"""Operators that compute every element of the result from one of each operand."""

EXPANSIONS = functions_named("expand", "expand_as", "repeat")
JOINS = functions_named("cat", "concat", "concatenate")
REARRANGING = functions_named(
    *(
        "contiguous",
        "flatten",
        "moveaxis",
        "movedim",
        "permute",
        "reshape",
        "squeeze",
        "swapaxes",
        "swapdims",
    ),
    *("t", "transpose", "unflatten", "unsqueeze", "view"),
) | {getattr(Tensor, name).__get__ for name in ("T", "mT")}
"""Functions that return all elements of a tensor, each once."""
