"""Rules of functions and tensor methods on values of K members; what has none runs under `torch.vmap`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from psgrad.ensemble.layers import Computed, draw_dropout
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.ensemble.value import Layout, Value

__all__ = ["FUNCTION_RULES", "IN_PLACE", "METHOD_RULES", "is_fact"]

Rule = Callable[..., Computed | str]
"""From the random streams and the function's own arguments."""


def _elementwise(function: Callable[..., Any]) -> Rule:
    def rule(_: MemberRandomness, *args: Any, **kwargs: Any) -> Computed | str:
        kwargs.pop("inplace", None)
        values = [a for a in args if isinstance(a, Value)]
        if any(isinstance(a, Value | Tensor) for a in kwargs.values()):
            return "a tensor is given by name"
        # plain tensors, the same for all members, have to be aligned as the values are
        if any(isinstance(a, Tensor) and a.ndim for a in args):
            members = values[0].members
            args = tuple(Value.shared(a, members) if isinstance(a, Tensor) and a.ndim else a for a in args)
            values = [a for a in args if isinstance(a, Value)]
        members, rank = values[0].members, max(value.rank for value in values)
        if all(value.layout is Layout.SHARED for value in values):
            out = function(*(a.tensor if isinstance(a, Value) else a for a in args), **kwargs)
            return Computed(Value.shared(out, members), "once", "shared data, no parameters")
        if len(values) == 1:
            out = function(*(a.tensor if isinstance(a, Value) else a for a in args), **kwargs)
            return Computed(Value(out, values[0].layout, members), "folded", "element by element")
        if any(value.layout is Layout.FOLDED for value in values):
            out = function(*(a.as_split(rank) if isinstance(a, Value) else a for a in args), **kwargs)
            return Computed(Value.of_split(out), "folded", "element by element")
        out = function(*(a.as_padded(rank) if isinstance(a, Value) else a for a in args), **kwargs)
        return Computed(Value.stacked(out), "folded", "element by element")

    return rule


def _in_place(function: Callable[..., Any]) -> Rule:
    """Compute out of place; the interpreter gives the name its new value."""
    compute = _elementwise(function)

    def rule(randomness: MemberRandomness, x: Any, *args: Any, **kwargs: Any) -> Computed | str:
        computed = compute(randomness, x, *args, **kwargs)
        if isinstance(computed, str) or not isinstance(x, Value):
            return computed
        if computed.value.shape != x.shape:
            return "the result does not fit in place"
        value = computed.value
        result = Value(value.tensor.to(x.tensor.dtype), value.layout, value.members)
        return Computed(result, computed.strategy, computed.why)

    return rule


def _dropout(channels: bool) -> Rule:
    def rule(
        randomness: MemberRandomness, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Computed | str:
        if not training or p == 0:
            return Computed(x, "folded", "nothing is dropped")
        return draw_dropout(x, p, randomness, channels=channels)

    return rule


def _flatten(_: MemberRandomness, x: Value, start_dim: int = 0, end_dim: int = -1) -> Computed | str:
    if x.rank < 2 or start_dim % x.rank != 1 or end_dim % x.rank != x.rank - 1:
        return "not from the channels to the end"
    if x.layout is Layout.STACKED:
        return Computed(Value.stacked(x.tensor.flatten(2)), "folded", "a view")
    return Computed(Value(x.tensor.flatten(1), x.layout, x.members), "folded", "a view")


def _reshape(_: MemberRandomness, x: Value, *shape: Any) -> Computed | str:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not all(isinstance(size, int) for size in sizes):
        return "not to a shape"
    if x.layout is Layout.SHARED:
        return Computed(Value.shared(x.tensor.reshape(*sizes), x.members), "once", "shared data")
    resolved = _resolved(x.shape, tuple(sizes))
    if x.layout is Layout.FOLDED and len(resolved) > 1 and resolved[0] == x.shape[0]:
        # N(KC).. -> NK.. -> N(K..)
        split = x.as_split().reshape(resolved[0], x.members, *resolved[1:])
        return Computed(Value.of_split(split), "folded", "the batch axis stays")
    return Computed(Value.stacked(x.as_stacked().reshape(x.members, *resolved)), "stacked", "a new shape")


def _resolved(shape: torch.Size, sizes: tuple[int, ...]) -> torch.Size:
    return torch.empty(1).expand(shape).reshape(sizes).shape if -1 in sizes else torch.Size(sizes)


def _reduction(function: Callable[..., Tensor]) -> Rule:
    def rule(_: MemberRandomness, x: Value, dim: Any = None, keepdim: bool = False) -> Computed | str:
        dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
        positive = [d % x.rank for d in dims]
        if dims and x.layout is Layout.STACKED:
            out = function(x.tensor, [d + 1 for d in positive], keepdim)
        elif dims and min(positive) >= 2:
            out = function(x.tensor, positive, keepdim)
        else:
            return "not over spatial axes alone"
        return Computed(Value(out, x.layout, x.members), "folded", "channel by channel")

    return rule


def _cat(_: MemberRandomness, tensors: Any, dim: int = 0) -> Computed | str:
    values = [t for t in tensors if isinstance(t, Value)]
    rank = values[0].rank
    if len(values) != len(tensors) or rank < 2 or any(value.rank != rank for value in values):
        return "not values of one rank, with channels"
    if all(value.layout is Layout.SHARED for value in values):
        out = torch.cat([value.tensor for value in values], dim)
        return Computed(Value.shared(out, values[0].members), "once", "shared data")
    axis = dim % rank
    members = values[0].members
    splits = [value.as_split().expand(-1, members, *(-1,) * (rank - 1)) for value in values]
    return Computed(Value.of_split(torch.cat(splits, axis and axis + 1)), "folded", "beside K")


def _channelwise(function: Callable[..., Any]) -> Rule:
    def rule(_: MemberRandomness, x: Any, *args: Any, **kwargs: Any) -> Computed | str:
        if x.rank != 4 or kwargs.get("return_indices") or True in args[5:]:
            return "not of a batch of images"
        if x.layout is Layout.SHARED:
            out = function(x.tensor, *args, **kwargs)
            return Computed(Value.shared(out, x.members), "once", "shared data, no parameters")
        out = function(x.as_folded(), *args, **kwargs)
        return Computed(Value.folded(out, x.members), "folded", "channel by channel")

    return rule


_ELEMENTWISE: tuple[Callable[..., Any], ...] = (
    F.celu, F.elu, F.gelu, F.hardshrink, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu,
    F.logsigmoid, F.mish, F.relu, F.relu6, F.selu, F.silu, F.softplus, F.softsign,
    operator.add, operator.mul, operator.neg, operator.pow, operator.sub, operator.truediv,
    torch.abs, torch.add, torch.clamp, torch.cos, torch.div, torch.exp, torch.maximum, torch.minimum,
    torch.mul, torch.neg, torch.pow, torch.relu, torch.rsqrt, torch.sigmoid, torch.sin, torch.sqrt,
    torch.square, torch.sub, torch.tanh,
)  # fmt: skip  # one a line is a page

_IN_PLACE_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: torch.add,
    operator.imul: torch.mul,
    operator.ipow: torch.pow,
    operator.isub: torch.sub,
    operator.itruediv: torch.div,
    torch.relu_: torch.relu,
}

_METHODS: dict[str, Callable[..., Any]] = {
    "abs": torch.abs, "add": torch.add, "clamp": torch.clamp, "div": torch.div, "exp": torch.exp,
    "mul": torch.mul, "neg": torch.neg, "pow": torch.pow, "relu": torch.relu, "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt, "square": torch.square, "sub": torch.sub, "tanh": torch.tanh,
}  # fmt: skip  # one a line is a page

_IN_PLACE_METHODS: dict[str, Callable[..., Any]] = {
    "add_": torch.add,
    "div_": torch.div,
    "mul_": torch.mul,
    "relu_": torch.relu,
    "sigmoid_": torch.sigmoid,
    "sub_": torch.sub,
    "tanh_": torch.tanh,
}

FUNCTION_RULES: dict[Callable[..., Any], Rule] = {
    **{function: _elementwise(function) for function in _ELEMENTWISE},
    **{function: _in_place(out) for function, out in _IN_PLACE_FUNCTIONS.items()},
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.mean: _reduction(torch.mean),
    torch.sum: _reduction(torch.sum),
    torch.amax: _reduction(torch.amax),
    torch.cat: _cat,
    torch.concat: _cat,
    F.dropout: _dropout(channels=False),
    F.adaptive_avg_pool2d: _channelwise(F.adaptive_avg_pool2d),
    F.avg_pool2d: _channelwise(F.avg_pool2d),
    F.max_pool2d: _channelwise(F.max_pool2d),
    torch.max_pool2d: _channelwise(torch.max_pool2d),
    F.interpolate: _channelwise(F.interpolate),
}
"""Rule of every function that has one."""

METHOD_RULES: dict[str, Rule] = {
    **{name: _elementwise(function) for name, function in _METHODS.items()},
    **{name: _in_place(function) for name, function in _IN_PLACE_METHODS.items()},
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "mean": _reduction(torch.mean),
    "sum": _reduction(torch.sum),
    "amax": _reduction(torch.amax),
    "contiguous": lambda _, x: Computed(
        Value(x.tensor.contiguous(), x.layout, x.members), "folded", "a copy where the order is another"
    ),
}
"""Rule of every tensor method that has one."""

IN_PLACE: frozenset[Any] = frozenset({*_IN_PLACE_FUNCTIONS, *_IN_PLACE_METHODS})
"""Functions and methods with a rule that change their first argument."""

_FACTS: dict[str, frozenset[str]] = {
    "call_method": frozenset(
        {"size", "dim", "numel", "ndimension", "nelement", "is_floating_point", "get_device"}
    ),
    "call_function": frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}),
}


def is_fact(node: fx.Node) -> bool:
    """Whether the node returns no tensor, and depends on no value of one."""
    name = node.args[1] if node.target is getattr else node.target
    return name in _FACTS.get(node.op, ())
