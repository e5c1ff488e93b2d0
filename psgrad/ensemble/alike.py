"""Whether two modules hold the same in what is no parameter, buffer or module of theirs."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Comparison", "class_name"]

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    type(None),
    CodeType,
    torch.dtype,
    torch.device,
    torch.Size,
)


def class_name(value: Any) -> str:
    """By name: a class that is made anew each time (in a factory, by a parametrization) is the same one."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class Comparison:
    """Compares objects by what they consist of.

    Parameters
    ----------
    registered
        Pairs of modules, parameters and buffers that correspond to each other: alike, whatever they hold.

    """

    def __init__(self, registered: Iterable[tuple[object, object]]) -> None:
        self._registered = {(id(a), id(b)) for a, b in registered}
        self._seen: dict[tuple[int, int], tuple[object, object]] = {}  # held, so that no id is used again

    def alike(self, a: Any, b: Any) -> bool:
        """Whether two objects are the same; no where it cannot be told."""
        pair = id(a), id(b)
        if a is b or pair in self._registered or pair in self._seen:
            return True
        if class_name(a) != class_name(b):
            return False
        if isinstance(a, _PLAIN):
            return bool(a == b or (a != a and b != b))  # nan
        if isinstance(a, Tensor):
            return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and (
                a.is_meta or torch.equal(a, b)
            )
        self._seen[pair] = a, b
        if isinstance(a, CellType):  # a copied module's functions still hold what is the first member's
            return (id(_content(a)), id(_content(b))) not in self._registered and self.alike(
                _content(a), _content(b)
            )
        ours, theirs = _parts(a), _parts(b)
        if ours is None or theirs is None:
            return _equal(a, b)
        return (len(ours) == len(theirs) and all(map(self.alike, ours, theirs))) or _equal(a, b)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _parts(value: Any) -> Sequence[Any] | None:
    """Return what an object consists of; None if it does not tell."""
    if type(value) in (list, tuple, deque):
        return list(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values(), getattr(value, "__dict__", None)]
    if isinstance(value, FunctionType):
        defaults = value.__defaults__, value.__kwdefaults__
        return [value.__code__, *defaults, *(value.__closure__ or ())]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, nn.Module):
        return [{name: part for name, part in vars(value).items() if "hooks" not in name}]
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # what cannot be pickled raises what it likes
        return None
    if isinstance(reduced, str):
        return [reduced]
    return [list(part) if i in (3, 4) and part is not None else part for i, part in enumerate(reduced)]


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # a tensor inside, say
        return False
