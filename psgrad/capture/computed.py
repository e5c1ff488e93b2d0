"""Layers whose weight is computed from parameters: standardised, normed, low-rank, scaled.

The layer's rule gives the verbs for the computed weight; the chain rule, one small backward pass through
the computation, carries them over to the parameters. A weighted sum is carried over once, not per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from psgrad.capture.contribution import Contribution, KeptGrads, LayerUse, PerParameter
from psgrad.capture.functions import layer_like
from psgrad.layers.base import squared_norms

__all__ = ["Carried", "Computed", "Made", "Operand", "saved_as_they_are"]

CHUNK_BYTES = 16 * 2**20
"""Of gradients that are made to be carried over and squared, if one sample's are not more."""


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

    """

    value: Tensor
    leaves: Mapping[nn.Parameter, Tensor]


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
        for name, of in made.items():
            computed = nn.Parameter(of.value.detach(), requires_grad=of.value.requires_grad)
            layer._parameters[name] = computed
            self._leaves |= of.leaves
            if of.value.requires_grad:
                self._values[computed] = of.value

    @classmethod
    def of(cls, settings: nn.Module, **operands: Operand) -> Computed:
        """Return a layer of these settings with parameters that may be computed."""
        made = {name: operand for name, operand in operands.items() if isinstance(operand, Made)}
        given = {name: None if isinstance(o, Made) else o for name, o in operands.items()}
        return cls(layer_like(settings, **given), made)

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


@dataclass(frozen=True)
class Carried(Contribution):
    """What such a layer contributes: its plain layer's use, carried over."""

    path: str
    computed: Computed
    use: LayerUse

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
        """See `Contribution.sq_norms`; gradients are made of a few samples at a time."""
        size = sum(p.nbytes for p in self.use.parameters)
        step = max(1, CHUNK_BYTES // max(1, size))
        if step >= self.samples:
            return {p: squared_norms(grad) for p, grad in self.grads().items()}
        parts = [
            Carried(self.path, self.computed, self.use.of_samples(slice(start, start + step))).sq_norms()
            for start in range(0, self.samples, step)
        ]
        return {p: torch.cat([part[p] for part in parts]) for p in self.parameters}

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`."""
        return self.computed.carry(self.use.weighted_sum(factors), per_sample=False)

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return self.use.tensors()

    def kept(self) -> Contribution:
        """See `Contribution.kept`."""
        if not self.use.rule.keeps_grads(self.use.call):
            return self
        return KeptGrads(self.path, self.grads(), self.samples)
