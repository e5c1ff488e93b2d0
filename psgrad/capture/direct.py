"""A module that uses parameters of its own on the batch as a whole, where every use is provably per-sample.

While its forward runs, a stand-in is in each parameter's place, and everything that torch is called for with
one comes here. A class token that is expanded over the batch and put beside the batch's rows, a position
embedding or layer scale that is broadcast over them, a linear map or an attention by function: in these,
sample n's rows meet sample n's own copy of the parameter and no other. Whatever else is done with a stand-in
is an `UnknownUseError`, and the module runs one sample at a time instead (`psgrad.capture.region`).

What is known of a tensor is what layers with a rule take as known: that its axis 0 is the batch, because it
has the batch's rows whatever their number. It also must come from the batch: an input, or what requires grad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from psgrad.capture.copies import Record, own_copies
from psgrad.capture.swap import shown, swapped
from psgrad.errors import CaptureError
from psgrad.layers import RULES, LayerRule

__all__ = ["Direct", "UnknownUseError"]


class UnknownUseError(CaptureError):
    """A parameter is used in a way that is not known to keep the samples apart."""


class StandIn(Tensor):
    """What a module sees in a parameter's place; it has no values.

    Attributes
    ----------
    run
        Whose it is.
    parameter
        Which it stands in for.
    rows
        None for the parameter as it is; or, once expanded over the batch, the batch's copies `[(N K), ..]`.

    """

    run: Direct
    parameter: nn.Parameter
    rows: Tensor | None

    @staticmethod
    def of(run: Direct, p: nn.Parameter, rows: Tensor | None = None) -> StandIn:
        """Make one."""
        like = p if rows is None else rows
        made = Tensor._make_wrapper_subclass(
            StandIn, like.shape, dtype=like.dtype, device=like.device, requires_grad=True
        )
        made.run, made.parameter, made.rows = run, p, rows
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        stand_in = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, StandIn))
        with torch._C.DisableTorchFunctionSubclass():
            run = stand_in.run
        return run.use(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it static
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnknownUseError(f"{func} got a parameter's stand-in")


class Direct:
    """One run of a module.

    Parameters
    ----------
    rows, rows_per_sample
        N K and K.
    record
        Called in backward with a parameter and its `[N, *shape]` gradient, once.
    by_rule
        Computes and captures what a rule says of a module without parameters that is given two, as its
        weight and bias, on an input whose axis 0 is the batch.
    anchor
        A scalar that requires grad.

    """

    def __init__(
        self,
        rows: int,
        rows_per_sample: int,
        record: Record,
        by_rule: Callable[[LayerRule, nn.Module, nn.Parameter, nn.Parameter | None, Tensor], Tensor],
        anchor: Tensor,
    ) -> None:
        self._rows = rows
        self._rows_per_sample = rows_per_sample
        self._record = record
        self._anchor = anchor
        self._by_rule = by_rule
        self._stand_ins: dict[nn.Parameter, StandIn] = {}
        self._expanded: dict[nn.Parameter, Tensor] = {}
        self._inputs: list[Any] = []
        self._unknown: UnknownUseError | None = None
        self._over = False

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module's `forward`, with stand-ins in the places of its and its children's parameters.

        Raises
        ------
        UnknownUseError
            If one was used in an unknown way, also where the module's own code caught that.

        """
        self._inputs = tree_leaves((args, kwargs))
        try:
            with swapped(shown(module), self._stand_in):
                out = forward(*args, **kwargs)
        finally:
            self._over = True
            self._inputs = []
        if self._unknown is not None:
            raise self._unknown
        if any(isinstance(t, StandIn) for t in tree_leaves(out)):
            self._refuse("what the module returns has a parameter that no row of the batch has met")
        return out

    def use(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what torch was called for.

        Raises
        ------
        UnknownUseError
            If it is not known.

        """
        if self._over:
            self._refuse(f"{_named(func)} got a parameter that a module had kept from its last forward")
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        if func in BROADCAST and kwargs.keys() <= {"alpha"}:
            return func(*self._aligned(func, args), **kwargs)
        if func in EXPANSIONS and not kwargs:
            return self._expansion(func, *args)
        if func in JOINS and kwargs.keys() <= {"dim"}:
            return self._join(func, *args, **kwargs)
        return self._refuse(f"{_named(func)} is not known to keep the samples apart")

    def _refuse(self, reason: str) -> NoReturn:
        self._unknown = UnknownUseError(reason)
        raise self._unknown

    def _stand_in(self, p: nn.Parameter) -> StandIn:
        if p not in self._stand_ins:
            self._stand_ins[p] = StandIn.of(self, p)
        return self._stand_ins[p]

    def _is_batch(self, t: Any) -> bool:
        """Whether axis 0 of a tensor is the batch; see the module."""
        if not isinstance(t, Tensor) or isinstance(t, StandIn) or t.shape[:1] != (self._rows,):
            return False
        return t.requires_grad or any(t is given for given in self._inputs)

    def _rows_of(self, p: nn.Parameter) -> Tensor:
        """Every row's copy, `[(N K), *shape]`."""
        if p not in self._expanded:
            samples = self._rows // self._rows_per_sample
            copies = own_copies(self._record, p, samples, self._anchor)
            if self._rows_per_sample > 1:  # N.. -> (NK)..
                copies = copies.unsqueeze(1).expand(-1, self._rows_per_sample, *p.shape).flatten(0, 1)
            self._expanded[p] = copies
        return self._expanded[p]

    def _over_batch(self, stand_in: StandIn, ndim: int) -> Tensor:
        """Copies for the rows of a tensor with `ndim` axes, of which the parameter has those at the end."""
        p = stand_in.parameter
        if stand_in.rows is not None:
            if stand_in.rows.ndim != ndim:
                self._refuse(f"copies of {tuple(p.shape)} for every row, used with {ndim} axes")
            return stand_in.rows
        rows = self._rows_of(p)
        if p.ndim == ndim and p.shape[0] == 1:
            return rows.squeeze(1)
        if p.ndim < ndim:
            return rows.reshape(self._rows, *(1,) * (ndim - 1 - p.ndim), *p.shape)
        return self._refuse(f"a parameter {tuple(p.shape)} is not the same for every row of {ndim} axes")

    def _aligned(self, func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Of an operator on a stand-in and the batch, both in either order, the operands."""
        if len(args) != 2 or sum(map(self._is_batch, args)) != 1:
            self._refuse(f"{_named(func)} of a parameter and what is not known to be the batch")
        first, second = args
        if isinstance(second, StandIn):
            return first, self._over_batch(second, first.ndim)
        if func in IN_PLACE:
            self._refuse(f"{_named(func)} would write to a parameter")
        return self._over_batch(first, second.ndim), second

    def _expansion(self, func: Any, stand_in: Any, *sizes: Any) -> StandIn:
        if func is Tensor.expand_as:
            sizes = sizes[0].shape if self._is_batch(sizes[0]) else ()
        sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        if not isinstance(stand_in, StandIn) or stand_in.rows is not None or sizes[:1] != (self._rows,):
            self._refuse(f"{_named(func)} of a parameter, but not over the {self._rows} rows of the batch")
        rows = self._over_batch(stand_in, len(sizes))
        if func is Tensor.repeat:
            return StandIn.of(self, stand_in.parameter, rows.repeat(1, *sizes[1:]))
        return StandIn.of(self, stand_in.parameter, rows.expand(sizes))

    def _join(self, func: Any, tensors: Any, dim: int = 0) -> Tensor:
        batch = [t for t in tensors if self._is_batch(t)]
        copies = [t.rows for t in tensors if isinstance(t, StandIn) and t.rows is not None]
        if not batch or len(batch) + len(copies) != len(tensors) or dim % batch[0].ndim == 0:
            self._refuse(f"{_named(func)} of a parameter, but not beside the batch's rows")
        return func([t.rows if isinstance(t, StandIn) else t for t in tensors], dim)

    def _linear(self, x: Any, weight: Any, bias: Any = None) -> Tensor:
        return self._layer(RULES[nn.Linear], nn.Module(), x, weight, bias)

    def _layer_norm(
        self, x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        layer = nn.LayerNorm(tuple(normalized_shape), eps, elementwise_affine=False)
        return self._layer(RULES[nn.LayerNorm], layer, x, weight, bias)

    def _layer(self, rule: LayerRule, layer: nn.Module, x: Any, weight: Any, bias: Any) -> Tensor:
        """Compute by a rule what a function computes of the batch and parameters as they are."""
        given = [t.parameter if isinstance(t, StandIn) and t.rows is None else t for t in (weight, bias)]
        if given[0] is None or any(type(p) is not nn.Parameter for p in given if p is not None):
            self._refuse("a function of a layer, with a weight or bias that is computed")
        if isinstance(x, StandIn) or x.shape[:1] != (self._rows,) or rule.input_error(layer, x) is not None:
            self._refuse("a function of a layer, of what is not known to be the batch")
        return self._by_rule(rule, layer, given[0], given[1], x)

    def _attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        width: int,
        heads: int,
        weight: Any,
        bias: Any,
        bias_k: Any,
        bias_v: Any,
        add_zero_attn: bool,
        dropout: float,
        out_weight: Any,
        out_bias: Any,
        training: bool = True,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        use_separate_proj_weight: bool = False,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Self-attention `L N E`, without its weights, and with a mask that all samples share or none."""
        unusual = (key is not query, value is not query, bias_k is not None, bias_v is not None, need_weights)
        shared = attn_mask is None or (type(attn_mask) is Tensor and attn_mask.ndim == 2)
        rest = (add_zero_attn, key_padding_mask is not None, use_separate_proj_weight, not shared)
        if any(unusual) or any(rest) or query.ndim != 3 or query.shape[1:] != (self._rows, width):
            self._refuse("attention other than of a batch to itself")
        if others.get("static_k") is not None or others.get("static_v") is not None:
            self._refuse("attention to given keys or values")
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # here True is what is left out
            attn_mask = attn_mask.logical_not()
        causal = others.get("is_causal", False) and attn_mask is not None
        # L N E -> N L (3 H D) -> N H L D, three of them
        parts = self._linear(query.transpose(0, 1), weight, bias).chunk(3, 2)
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
        mask, dropout = None if causal else attn_mask, dropout if training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
        return self._linear(mixed.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1), None


def _named(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _functions(*names: str) -> frozenset[Any]:
    found = [getattr(owner, name, None) for owner in (torch, Tensor) for name in names]
    return frozenset(f for f in found if f is not None)


ABOUT = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "layout", "is_leaf")),
        *_functions("size", "dim", "numel", "is_floating_point", "__len__"),
    }
)
"""What asks about a parameter, but not for its values."""

IN_PLACE = _functions("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
BROADCAST = IN_PLACE | _functions(
    *("add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
)
"""Operators that compute every element of the result from one of each operand."""

EXPANSIONS = _functions("expand", "expand_as", "repeat")
JOINS = _functions("cat", "concat", "concatenate")
