"""Layers whose weight is computed from parameters: standardised, normed, low-rank, scaled.

The layer's rule gives the verbs for the computed weight; the chain rule, one small backward pass through
the computation, carries them over to the parameters. A weighted sum is carried over once, not per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from psgrad.capture.contribution import Contribution, KeptGrads, LayerUse, PerParameter
from psgrad.capture.functions import layer_like
from psgrad.capture.rearranged import Rearranged
from psgrad.capture.row_maps import RowMaps
from psgrad.capture.row_probes import row_maps
from psgrad.layers import LayerCall, LayerRule
from psgrad.layers.base import squared_norms

__all__ = ["Carried", "Computed", "Made", "Operand", "Output", "saved_as_they_are"]

CHUNK_BYTES = 16 * 2**20
"""Of gradients that are made to be carried over and squared, if one sample's are not more."""
FEWEST_SAMPLES = 4
"""Gradients of fewer are carried over: to find out how the map is made takes as long."""


def saved_as_they_are() -> AbstractContextManager[None]:
    """Keep what is computed inside for its backward, also in a checkpoint, which would compute it again."""
    return saved_tensors_hooks(_pack, _unpack)


def _pack(t: Tensor) -> tuple[Tensor, int]:
    return t.detach(), t._version


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    t, version = saved
    if t._version != version:
        raise RuntimeError(
            f"a tensor {tuple(t.shape)} that a weight is computed of was changed in place after forward: let "
            "backward come before the optimizer's step"
        )
    return t


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that is computed of parameters alone.

    Attributes
    ----------
    value
        The tensor. Its graph ends in the leaves.
    leaves
        What stands for each parameter in the graph.
    rearranged
        Whether it has the elements of one parameter, each once, in another order.

    """

    value: Tensor
    leaves: Mapping[nn.Parameter, Tensor]
    rearranged: bool = False


Operand = Made | nn.Parameter | None
"""What a layer may have for a weight or bias."""


class Computed:
    """A plain layer some of whose parameters are computed from others.

    Parameters
    ----------
    layer
        With the parameters that are not computed. Gets the computed values as parameters.
    made
        By the name of the layer's parameter.

    Attributes
    ----------
    layer
        The plain layer.

    """

    def __init__(self, layer: nn.Module, made: Mapping[str, Made]) -> None:
        self.layer = layer
        self._own = [p for p in layer._parameters.values() if p is not None and p.requires_grad]
        self._leaves: dict[nn.Parameter, Tensor] = {}
        self._values: dict[nn.Parameter, Tensor] = {}
        self._rearranged: dict[nn.Parameter, Rearranged] = {}
        for name, of in made.items():
            computed = nn.Parameter(of.value.detach(), requires_grad=of.value.requires_grad)
            layer._parameters[name] = computed
            self._leaves |= of.leaves
            if of.value.requires_grad:
                self._values[computed] = of.value
            if of.rearranged:
                self._rearranged[computed] = Rearranged(*of.leaves)

    @classmethod
    def of(cls, settings: nn.Module, **operands: Operand) -> Computed:
        """Return a layer of these settings with parameters that may be computed."""
        made = {name: operand for name, operand in operands.items() if isinstance(operand, Made)}
        given = {name: None if isinstance(o, Made) else o for name, o in operands.items()}
        return cls(layer_like(settings, **given), made)

    @property
    def weight(self) -> nn.Parameter | None:
        """The plain layer's weight, if it alone is computed, of parameters without another use here."""
        weight = self.layer._parameters.get("weight")
        alone = self._values.keys() == {weight} and self._leaves.keys().isdisjoint(self._own)
        return weight if alone else None

    @property
    def rearranged(self) -> Rearranged | None:
        """What tells norms where the weight is a parameter in another order."""
        return None if self.weight is None else self._rearranged.get(self.weight)

    def norms_by_rows(self, rule: LayerRule, call: LayerCall) -> bool:
        """Whether `maps` are of use, if they are known, for norms of a call."""
        outputs = rule.output_axis is not None and self.weight is not None and self.rearranged is None
        return outputs and call.g.dtype.itemsize >= 4 and call.samples >= FEWEST_SAMPLES

    @cached_property
    def maps(self) -> RowMaps | None:
        """How gradients of the weight's rows arrive at the parameters, where that is of a known form."""
        return None if self.weight is None else row_maps(self._values[self.weight], self._leaves)

    @property
    def as_it_is(self) -> bool:
        """Whether nothing is computed."""
        return not self._values

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trainable parameters behind the layer, each once."""
        return tuple(dict.fromkeys((*self._own, *self._leaves)))

    def carry(self, grads: PerParameter, *, per_sample: bool) -> PerParameter:
        """Gradients of the plain layer's parameters -> those of the parameters behind it."""
        carried = {p: grads[p] for p in self._own}
        computed = [p for p in self._values if p in grads]
        if not computed:
            return carried
        behind = torch.autograd.grad(
            [self._values[p] for p in computed],
            list(self._leaves.values()),
            [grads[p].to(p.dtype) for p in computed],
            retain_graph=True,
            is_grads_batched=per_sample,
            materialize_grads=True,
        )
        for p, grad in zip(self._leaves, behind, strict=True):
            carried[p] = carried[p] + grad if p in carried else grad
        return carried


class Output:
    """What a call of such a layer returned, once its backward begins.

    Only where norms are had from it, and if nobody wrote to it.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def of(self, out: Tensor, computed: Computed, rule: LayerRule, call: LayerCall) -> Tensor:
        """Return what `rule` made in this call, whose output stands for its gradient."""
        if not out.requires_grad or not computed.norms_by_rows(rule, call) or rule.keeps_grads(call):
            return out
        return _Returned.apply(self, out)

    def see(self, value: Tensor) -> None:
        """Know it."""
        self._value = value

    def take(self) -> Tensor | None:
        """Return it, or None, and let go of it."""
        value, self._value = self._value, None
        return value


class _Returned(torch.autograd.Function):
    """`out` as it is."""

    @staticmethod
    def forward(ctx: Any, output: Output, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        ctx.output = output
        return out.detach()  # no view: what follows may write to it in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        with suppress(RuntimeError):  # of what was written to; a graph that is gone is told of by the layer
            ctx.output.see(ctx.saved_tensors[0].detach())
        return None, g


@dataclass(frozen=True)
class Carried(Contribution):
    """What such a layer contributes: its plain layer's use, carried over.

    Attributes
    ----------
    path
        See `Contribution`.
    computed
        The layer.
    use
        Of the plain layer, as it is or written out.
    output
        What the plain layer returned.

    """

    path: str
    computed: Computed
    use: LayerUse | KeptGrads
    output: Output = field(default_factory=Output)

    @property
    def samples(self) -> int:  # type: ignore[override]  # read-only here
        """N."""
        return self.use.samples

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:  # type: ignore[override]  # read-only here
        """See `Contribution`."""
        return self.computed.parameters

    def grads(self) -> PerParameter:
        """See `Contribution.grads`."""
        if self.samples:
            return self.computed.carry(self.use.grads(), per_sample=True)
        return {p: p.new_zeros(0, *p.shape) for p in self.parameters}

    def sq_norms(self) -> PerParameter:
        """See `Contribution.sq_norms`; where rows of the weight are mapped one by one, nothing is carried."""
        output = self.output.take()  # held no longer, whichever way
        maps = self._maps()
        return self._sq_norms_carried() if maps is None else self._sq_norms_by(maps, output)

    def _maps(self) -> RowMaps | Rearranged | None:
        if self.computed.rearranged is not None:
            return self.computed.rearranged
        if isinstance(self.use, LayerUse) and not self.computed.norms_by_rows(self.use.rule, self.use.call):
            return None
        return self.computed.maps

    def _sq_norms_by(self, maps: RowMaps | Rearranged, output: Tensor | None) -> PerParameter:
        plain = self.computed.weight
        assert plain is not None
        if isinstance(self.use, KeptGrads):
            norms = maps.sq_norms_of(self.use.written[plain])
            norms |= {p: squared_norms(grad) for p, grad in self.use.written.items() if p is not plain}
        else:
            norms = maps.sq_norms(self.use.rule, self.use.call, output)
            rest = tuple(name for name in self.use.call.wanted if name != "weight")
            norms |= LayerUse(self.path, self.use.rule, replace(self.use.call, wanted=rest)).sq_norms()
        eaten = torch.stack([n.isnan() for n in norms.values()]).any(0).nonzero().squeeze(1)
        if len(eaten):
            for p, exact in self._of_samples(eaten)._sq_norms_carried().items():
                norms[p][eaten] = exact.to(norms[p].dtype)
        return norms

    def _sq_norms_carried(self) -> PerParameter:
        """Squared norms of gradients that are made and carried over a few samples at a time."""
        size = sum(p.nbytes for p in self.use.parameters)
        step = max(1, CHUNK_BYTES // max(1, size))
        if step >= self.samples:
            return {p: squared_norms(grad) for p, grad in self.grads().items()}
        parts = [
            self._of_samples(slice(start, start + step))._sq_norms_carried()
            for start in range(0, self.samples, step)
        ]
        return {p: torch.cat([part[p] for part in parts]) for p in self.parameters}

    def _of_samples(self, samples: slice | Tensor) -> Carried:
        return Carried(self.path, self.computed, self.use.of_samples(samples))

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`."""
        return self.computed.carry(self.use.weighted_sum(factors), per_sample=False)

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return self.use.tensors()

    def kept(self) -> Contribution:
        """See `Contribution.kept`; of the plain layer if that tells the norms."""
        if isinstance(self.use, KeptGrads) or not self.use.rule.keeps_grads(self.use.call):
            return self
        if self._maps() is None:
            return KeptGrads(self.path, self.grads(), self.samples)
        kept = self.use.kept()
        assert isinstance(kept, LayerUse | KeptGrads)
        return replace(self, use=kept)
