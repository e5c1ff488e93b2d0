"""Which loss functions are known to leave nothing behind, so that they may run once for all members.

Under `torch.vmap` a function runs once, on tensors that are dead when it ends. What it stores of them cannot
be used, and what it counts is counted once.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import lru_cache, partial
from inspect import getclosurevars
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.ensemble.trace import is_altered

__all__ = ["leaves_nothing"]

_STORE = frozenset(
    {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "IMPORT_NAME", "YIELD_VALUE"}
)
_CHANGE = frozenset({"append", "appendleft", "extend", "extendleft", "insert", "setdefault", "update"})
_BUILTINS = frozenset(
    {
        "abs", "all", "any", "bool", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min",
        "pow", "range", "round", "sum", "tuple", "zip",
    }
)  # fmt: skip  # one a line is a page


def leaves_nothing(fn: Callable[..., Any]) -> bool:
    """Whether it is known that `fn` stores, counts and changes nothing outside of itself.

    Known are PyTorch's losses, and functions whose own code stores nothing, changes no tensor in place, and
    uses nothing from outside but PyTorch, tensors and plain values. Of any other it is not known.
    """
    if isinstance(fn, partial):
        return leaves_nothing(fn.func) and all(map(_is_plain, (*fn.args, *fn.keywords.values())))
    if _is_plain(fn):
        return True
    if not isinstance(fn, FunctionType) or not _stores_nothing(fn.__code__):
        return False
    outside = getclosurevars(fn)
    used = *outside.nonlocals.values(), *outside.globals.values()
    given = *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()
    return outside.builtins.keys() <= _BUILTINS and all(map(_is_plain, (*used, *given)))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device | None):
        return True
    if isinstance(value, nn.Module):
        return type(value).__module__ == "torch.nn.modules.loss" and not is_altered(value)
    if isinstance(value, MethodType):  # of an object that may hold anything
        return False
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in ("math", "torch")
    return callable(value) and (getattr(value, "__module__", None) or "").partition(".")[0] == "torch"


@lru_cache(maxsize=64)
def _stores_nothing(code: CodeType) -> bool:
    if any(isinstance(constant, CodeType) for constant in code.co_consts):  # a function of its own
        return False
    if any(name in _CHANGE or (name.endswith("_") and name[0] != "_") for name in code.co_names):
        return False
    return all(instruction.opname not in _STORE for instruction in dis.get_instructions(code))
