"""Layers whose weight is computed from other parameters (`torch.nn.utils.parametrize`).

The layer's rule gives the verbs for the computed weight; the chain rule, one small backward pass through
the computation, carries them over to the parameters. A weighted sum is carried over once, not per sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from psgrad.capture.contribution import Contribution, KeptGrads, LayerUse, PerParameter
from psgrad.layers.base import squared_norms

__all__ = ["Carried", "Computed"]


class Computed:
    """A layer as it was before it was parametrized, with its weights computed.

    Attributes
    ----------
    layer
        The plain layer; its parameters are the computed values.
    originals
        For each of the plain layer's trainable parameters that is the parametrized layer's own, that one.

    """

    def __init__(self, module: nn.Module) -> None:
        assert is_parametrized(module)
        plain: Any = type_before_parametrizations(module)
        self.layer: nn.Module = plain.__new__(plain)
        self.layer.__dict__.update(module.__dict__)
        self.layer.__dict__.pop("forward", None)
        self.layer._modules = {}
        self.layer._parameters = dict(module._parameters)
        self.originals: dict[nn.Parameter, nn.Parameter] = {
            p: p for p in module._parameters.values() if p is not None and p.requires_grad
        }
        self._leaves: dict[nn.Parameter, Tensor] = {}
        self._values: dict[nn.Parameter, Tensor] = {}
        parametrizations: Any = module.parametrizations
        for name, computation in parametrizations.items():
            leaves = {
                key: self._leaves.setdefault(p, p.detach().requires_grad_())
                for key, p in computation.named_parameters()
                if p.requires_grad
            }
            with torch.enable_grad():
                value = functional_call(computation, leaves, ())
            computed = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            self.layer._parameters[name] = computed
            if value.requires_grad:
                self._values[computed] = value

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trainable parameters behind the layer."""
        return (*self.originals, *self._leaves)

    def carry(self, grads: PerParameter, *, per_sample: bool) -> PerParameter:
        """Gradients of the plain layer's parameters -> those of the parameters behind it."""
        carried = {original: grads[p] for p, original in self.originals.items()}
        computed = [p for p in self._values if p in grads]
        behind = torch.autograd.grad(
            [self._values[p] for p in computed],
            list(self._leaves.values()),
            [grads[p].to(p.dtype) for p in computed],
            retain_graph=True,
            is_grads_batched=per_sample,
            materialize_grads=True,
        )
        return carried | dict(zip(self._leaves, behind, strict=True))


@dataclass(frozen=True)
class Carried(Contribution):
    """What a parametrized layer contributes: its plain layer's use, carried over."""

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
        """See `Contribution.sq_norms`."""
        return {p: squared_norms(grad) for p, grad in self.grads().items()}

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
