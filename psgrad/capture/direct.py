"""A module that uses parameters of its own on the batch as a whole, where every use is provably per-sample.

While its forward runs, a stand-in is in each parameter's place, and everything that torch is called for with
one comes here. A class token that is expanded over the batch and put beside the batch's rows, a position
embedding or layer scale that is broadcast over them, a linear map or an attention by function: in these,
sample n's rows meet sample n's own copy of the parameter and no other. What is computed of parameters alone
(`psgrad.capture.alone`) may be a layer's weight, as in weight standardisation, or meet the rows in the same
ways. Whatever else is done with a stand-in is an `UnknownUseError`, and the module runs one sample at a time
instead (`psgrad.capture.region`).

What is known of a tensor is what layers with a rule take as known: that its axis 0 is the batch, because it
has the batch's rows whatever their number. It also must come from the batch: an input, or what requires grad.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from psgrad.capture.alone import OfParameters
from psgrad.capture.attention import attention
from psgrad.capture.computed import Made, Operand
from psgrad.capture.contractions import CONTRACTIONS
from psgrad.capture.copies import Copies, Use
from psgrad.capture.functions import FORMULAS, FUNCTIONS, bound
from psgrad.capture.leaves import leaves_in
from psgrad.capture.lookups import LOOKUPS
from psgrad.capture.recurrent import RECURRENT
from psgrad.capture.row_by_row import is_row_by_row
from psgrad.capture.stand_in import (
    BROADCAST,
    EXPANSIONS,
    IN_PLACE,
    JOINS,
    REARRANGING,
    StandIn,
    has_value,
    named,
    sizes_of,
    with_rows,
    writes,
)
from psgrad.capture.survey import Layer
from psgrad.capture.swap import shown, swapped
from psgrad.errors import CaptureError, PsgradError

__all__ = ["Direct", "UnknownUse", "UnknownUseError", "unknown_use"]

IN_OTHER_TERMS = CONTRACTIONS | LOOKUPS

UnknownUse = Callable[[str, Layer | None], PsgradError]
"""Makes of a reason and a stand-in's source what is raised."""


class UnknownUseError(CaptureError):
    """A parameter is used in a way that is not known to keep the samples apart."""


def unknown_use(reason: str, source: Layer | None) -> UnknownUseError:
    """Return the error of a module's own parameters."""
    return UnknownUseError(reason)


class Direct:
    """One run of a module.

    Parameters
    ----------
    rows
        N K.
    copies
        Makes all samples' copies of parameters.
    by_rule
        See `Use`; of an input whose axis 0 is the batch.
    error
        Makes what an unknown use raises.
    tell
        Is told what is taken for the batch, and by what.

    """

    def __init__(
        self,
        rows: int,
        copies: Copies,
        by_rule: Use,
        error: UnknownUse,
        tell: Callable[[str, Tensor], None],
    ) -> None:
        self._error = error
        self._tell = tell
        self._rows = rows
        self._copies = copies
        self._by_rule = by_rule
        self._stand_ins: dict[nn.Parameter, StandIn] = {}
        self._of = OfParameters(copies.of)
        self._expanded: dict[Tensor, Tensor] = {}
        self._module: nn.Module | None = None
        self._inputs: list[Any] = []
        self._source: Layer | None = None  # of the stand-in that is being used
        self._unknown: PsgradError | None = None
        self._over: str | None = None  # whose forward it was, once that has ended

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module's `forward`, with stand-ins in the places of its and its children's parameters.

        Raises
        ------
        UnknownUseError
            If one was used in an unknown way, also where the module's own code caught that.

        """
        self.begin(module, args, kwargs)
        try:
            with swapped(shown(module), self._stand_in):
                out = forward(*args, **kwargs)
        finally:
            self.end()
        return self.returned(out)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Know the module and its inputs while it runs."""
        self._module, self._inputs = module, leaves_in(args, kwargs)

    def end(self) -> None:
        """Let go of them; stand-ins are of no use afterwards."""
        self._over = type(self._module).__name__
        self._module, self._inputs = None, []
        self._stand_ins.clear()
        self._expanded.clear()

    def returned(self, out: Any) -> Any:
        """Return what the run that is over returned, with what was expanded over the batch as its copies.

        Raises
        ------
        PsgradError
            If there was an unknown use in the run, or there is one in this: the run's error.

        """
        if self._unknown is not None:
            raise self._unknown
        (found,), _ = with_rows((out,), {})
        for t in leaves_in((found,), {}):
            if isinstance(t, StandIn):
                self.refuse(t, "what the module returns has a parameter that no row of the batch has met")
        return found

    def refuse(self, stand_in: StandIn, reason: str) -> NoReturn:
        """Raise for an unknown use of a stand-in."""
        self._source = stand_in.source
        self._refuse(reason)

    def computed(self, copies: Tensor, source: Layer | None) -> StandIn:
        """Stand in for a tensor of which every sample has a copy, `[N, *shape]`."""
        return StandIn.of(self, self._of.of_copies(self._copies.apart(copies)), source=source)

    def use(self, stand_in: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what torch was called for with a stand-in.

        Raises
        ------
        UnknownUseError
            If it is not known.

        """
        self._source = stand_in.source
        if self._over is not None:
            self._refuse(
                f"{named(func)} got what {self._over} kept of a parameter from an earlier forward (a cache): "
                "in training that is old. Compute it in every forward; some modules do, but in eval() mode"
            )
        if self._is_of_parameters_alone(func, args, kwargs):
            return self._of_parameters(func, args, kwargs)
        if func in FUNCTIONS:
            return self._layer(func, args, kwargs)
        if func in FORMULAS:
            return self._in_other_terms(FORMULAS[func], args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._in_other_terms(partial(attention, self._linear, self._rows), args, kwargs)
        if func in RECURRENT:
            return RECURRENT[func](self._linear, *args)
        if func in BROADCAST and kwargs.keys() <= {"alpha"}:
            return self._broadcast(func, args, kwargs)
        if func in EXPANSIONS and not kwargs:
            return self._expansion(func, *args)
        if func in JOINS and kwargs.keys() <= {"dim"}:
            return self._join(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._dot_product_attention(*args, **kwargs)
        if func in IN_OTHER_TERMS and has_value(args, kwargs):
            return self._in_other_terms(IN_OTHER_TERMS[func], args, kwargs)
        return self._among_rows(func, args, kwargs)

    def _is_of_parameters_alone(self, func: Any, args: Any, kwargs: Any) -> bool:
        for t in leaves_in(args, kwargs):
            if isinstance(t, StandIn):
                if t.run is not self or t.rows is not None:
                    return False
            elif isinstance(t, Tensor) and not self._is_constant(t):
                return False
        return func not in EXPANSIONS or sizes_of(args[1:])[:1] != (self._rows,)

    def _is_constant(self, t: Tensor) -> bool:
        """Whether a tensor is the module's own, or a part of one: any other may be the batch."""
        if t.requires_grad or any(t is given for given in self._inputs):
            return False
        if t.ndim == 0:
            return True
        assert self._module is not None
        own = (*self._module.buffers(), *self._module.parameters())
        return any(t is b or t._base is b for b in own)

    def _of_parameters(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what is asked for of parameters alone."""
        if writes(func, kwargs):
            self._refuse(f"{named(func)} would write to a parameter")
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, StandIn)]

        def run(*values: Tensor) -> Any:
            filled = list(leaves)
            for i, value in zip(places, values, strict=True):
                filled[i] = value
            inner_args, inner_kwargs = tree_unflatten(filled, structure)
            return func(*inner_args, **inner_kwargs)

        constants = [t for i, t in enumerate(leaves) if isinstance(t, Tensor) and i not in places]
        try:
            values = [leaves[i].value for i in places]
            found = self._of.run(run, values, constants, rearranges=func in REARRANGING)
        except Exception as error:  # whatever the function, or vmap, may raise
            self._refuse(f"{named(func)} of a parameter: {error}")
        return tree_map(self._instead_of, found)

    def _instead_of(self, value: Any) -> Any:
        return StandIn.of(self, value, source=self._source) if isinstance(value, Tensor) else value

    def _refuse(self, reason: str) -> NoReturn:
        self._unknown = self._error(reason, self._source)
        raise self._unknown

    def _stand_in(self, p: nn.Parameter) -> StandIn:
        if p not in self._stand_ins:
            self._stand_ins[p] = StandIn.of(self, p)
        return self._stand_ins[p]

    def _is_batch(self, t: Any) -> bool:
        """Whether axis 0 of a tensor is the batch; see the module."""
        if not isinstance(t, Tensor) or isinstance(t, StandIn) or t.shape[:1] != (self._rows,):
            return False
        found = t.requires_grad or any(t is given for given in self._inputs)
        if found:
            self._tell(type(self._module).__name__, t)
        return found

    def _copies_of(self, value: Tensor) -> Tensor:
        """Every sample's copy, `[N, *shape]`."""
        try:
            return self._of.copies(value)
        except Exception as error:  # whatever vmap may raise
            self._refuse(f"what is computed of parameters, for every sample: {error}")

    def _rows_of(self, value: Tensor) -> Tensor:
        """Every row's copy, `[(N K), *shape]`."""
        if value not in self._expanded:
            copies = self._copies_of(value)
            if self._rows > len(copies):  # N.. -> (NK)..
                each = self._rows // len(copies)
                copies = copies.unsqueeze(1).expand(-1, each, *value.shape).flatten(0, 1)
            self._expanded[value] = copies
        return self._expanded[value]

    def _over_batch(self, stand_in: StandIn, ndim: int) -> Tensor:
        """Copies for the rows of a tensor with `ndim` axes, of which the parameter has those at the end."""
        value = stand_in.value
        if stand_in.rows is not None:
            if stand_in.rows.ndim != ndim:
                self._refuse(f"copies of {tuple(value.shape)} for every row, used with {ndim} axes")
            return stand_in.rows
        rows = self._rows_of(value)
        if value.ndim == ndim and value.shape[0] == 1:
            return rows.squeeze(1)
        if value.ndim < ndim:
            return rows.reshape(self._rows, *(1,) * (ndim - 1 - value.ndim), *value.shape)
        return self._refuse(f"a parameter {tuple(value.shape)} is not the same for every row of {ndim} axes")

    def _broadcast(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Compute an operator on a stand-in and the batch, or what is expanded over it, in either order."""
        batch = [t for t in args if self._is_batch(t)]
        expanded = [t for t in args if isinstance(t, StandIn) and t.rows is not None]
        if len(args) != 2 or len(batch) > 1 or not (batch or expanded):
            self._refuse(f"{named(func)} of a parameter and what is not known to be the batch")
        if func in IN_PLACE and isinstance(args[0], StandIn):
            self._refuse(f"{named(func)} would write to a parameter")
        ndim = (batch or expanded)[0].ndim
        operands = [self._over_batch(t, ndim) if isinstance(t, StandIn) else t for t in args]
        if batch:
            return func(*operands, **kwargs)
        others = [t for t in args if isinstance(t, Tensor) and not isinstance(t, StandIn)]
        if not all(self._is_constant(t) and (t.ndim < ndim or t.shape[0] == 1) for t in others):
            self._refuse(f"{named(func)} of a parameter and what may not be the same for every row")
        return self._instead_of_rows(expanded[0], func(*operands, **kwargs))

    def _instead_of_rows(self, stand_in: StandIn, rows: Tensor) -> StandIn:
        return StandIn.of(self, stand_in.value, rows, stand_in.source)

    def _among_rows(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute a function of what has been expanded over the batch: of its rows alone, or with the batch.

        Together with the batch they are rows like any, that a model may do anything with.
        """
        leaves = leaves_in(args, kwargs)
        stand_ins = [t for t in leaves if isinstance(t, StandIn)]
        batch = any(self._is_batch(t) for t in leaves)
        if writes(func, kwargs) or any(t.rows is None for t in stand_ins):
            self._refuse(f"{named(func)} is not known to keep the samples apart")
        inner_args, inner_kwargs = with_rows(args, kwargs)
        if batch:
            return func(*inner_args, **inner_kwargs)
        first, *rest = inner_args
        if sum(isinstance(t, Tensor) for t in leaves) > 1 or not is_row_by_row(func, first, rest, kwargs):
            self._refuse(f"{named(func)} is not known to keep the samples apart")
        source = stand_ins[0]
        return tree_map(partial(self._instead_of_rows, source), func(*inner_args, **inner_kwargs))

    def _expansion(self, func: Any, stand_in: Any, *sizes: Any) -> StandIn:
        sizes = sizes_of(sizes) if func is not Tensor.expand_as or self._is_batch(sizes[0]) else ()
        if not isinstance(stand_in, StandIn) or stand_in.rows is not None or sizes[:1] != (self._rows,):
            self._refuse(f"{named(func)} of a parameter, but not over the {self._rows} rows of the batch")
        rows = self._over_batch(stand_in, len(sizes))
        rows = rows.repeat(1, *sizes[1:]) if func is Tensor.repeat else rows.expand(sizes)
        return StandIn.of(self, stand_in.value, rows, stand_in.source)

    def _join(self, func: Any, tensors: Any, dim: int = 0) -> Tensor:
        batch = [t for t in tensors if self._is_batch(t)]
        copies = [t.rows for t in tensors if isinstance(t, StandIn) and t.rows is not None]
        if not batch or len(batch) + len(copies) != len(tensors) or dim % batch[0].ndim == 0:
            self._refuse(f"{named(func)} of a parameter, but not beside the batch's rows")
        return func([t.rows if isinstance(t, StandIn) else t for t in tensors], dim)

    def _in_other_terms(self, formula: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return formula(*args, **kwargs)
        except (TypeError, ValueError) as error:
            self._refuse(str(error))

    def _linear(self, *operands: Any) -> Tensor:
        if not any(isinstance(t, StandIn) for t in operands):  # frozen ones of a recurrent network
            return F.linear(*operands)
        return self._layer(F.linear, operands, {})

    def _layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Compute by a rule what a function computes of the batch and what is the same for all samples."""
        call = bound(func, args, kwargs)
        if isinstance(call, str):
            if has_value(args, kwargs):
                if func not in IN_OTHER_TERMS:
                    self._refuse(call)
                return self._in_other_terms(IN_OTHER_TERMS[func], args, kwargs)
            return self._among_rows(func, args, kwargs)
        (x,), _ = with_rows((call.x,), {})
        known = (call.weight, call.bias, call.x if x is not call.x else None)
        if any(isinstance(t, StandIn) and not any(t is k for k in known) for t in leaves_in(args, kwargs)):
            self._refuse(f"{named(func)} got a parameter that is neither its weight nor its bias")
        if x is not call.x and not any(isinstance(t, StandIn) for t in (call.weight, call.bias)):
            inner_args, inner_kwargs = with_rows(args, kwargs)  # of a layer that is frozen
            return self._instead_of_rows(call.x, func(*inner_args, **inner_kwargs))
        weight, bias = self._operand(call.weight), self._operand(call.bias)
        if x.shape[:1] != (self._rows,) or call.rule.input_error(call.settings, x) is not None:
            self._refuse(f"{named(func)} of what is not known to be the batch")
        self._tell(type(self._module).__name__, x)
        return self._by_rule(call.rule, call.settings, weight, bias, x)

    def _operand(self, t: Any) -> Operand:
        """Return a function's weight or bias as a rule takes it."""
        if isinstance(t, StandIn):
            found = self._of.operand(t.value) if t.rows is None else None
        elif isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and self._is_constant(t):
            found = nn.Parameter(t.detach(), requires_grad=False)
        else:
            found = t
        if isinstance(found, Made | nn.Parameter) or t is None:
            return found
        return self._refuse("a function of a layer, with a weight or bias that may not be the same for all")

    def _dot_product_attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute it, also with a mask that is computed of parameters: biases of relative positions."""
        if isinstance(attn_mask, StandIn):
            attn_mask = self._over_batch(attn_mask, query.ndim)
        operands = query, key, value, attn_mask
        found: Tensor = self._among_rows(F.scaled_dot_product_attention, (*operands, *args), kwargs)
        return found
