"""What a captured layer contributes to its parameters' gradients, open to the three verbs.

Consumers (per-sample gradients, norms, clipping) see contributions only: no layer, no strategy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from psgrad.layers import LayerCall, LayerRule
from psgrad.layers.base import squared_norms, weighted

__all__ = ["Contribution", "KeptGrads", "LayerUse", "PerParameter"]

PerParameter = dict[nn.Parameter, Tensor]


class Contribution(ABC):
    """The per-sample gradients of some parameters, not necessarily written out.

    Attributes
    ----------
    path
        Of the module the parameters were used in.
    samples
        N. The results of an ensemble's contribution have `[K, N]` where a model's have `[N]`.
    parameters
        The parameters, in the module's order.

    """

    path: str
    samples: int
    parameters: tuple[nn.Parameter, ...]

    @abstractmethod
    def grads(self) -> PerParameter:
        """Per-sample gradient `[N, *p.shape]` of each parameter."""

    @abstractmethod
    def sq_norms(self) -> PerParameter:
        """Squared norm `[N]` for each parameter, float32 at least."""

    @abstractmethod
    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """`sum_n factors[n] * grads[n]` for each parameter, in its shape.

        `factors` is `[N]`; a factor of exactly 0 removes its sample, also one that is not finite.
        """

    def norms_and_sums(self) -> tuple[PerParameter, PerParameter] | None:
        """`sq_norms` and `weighted_sum` of factors 1 from the same work, or None if they share none."""
        return None

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that live as long as this does."""

    @abstractmethod
    def kept(self) -> Contribution:
        """Return the form to hold between the two verbs of clipping: written out, or as it is."""

    def plus(self, other: Contribution) -> Contribution:
        """Return both uses of the same parameters added up, sample by sample: a norm is that of the sum."""
        return KeptGrads(self.path, self.grads(), self.samples) + other


@dataclass(frozen=True)
class KeptGrads(Contribution):
    """Gradients that are written out."""

    path: str
    written: PerParameter
    samples: int
    parameters: tuple[nn.Parameter, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.written))

    def grads(self) -> PerParameter:
        """See `Contribution.grads`."""
        return self.written

    def sq_norms(self) -> PerParameter:
        """See `Contribution.sq_norms`."""
        return {p: squared_norms(grad) for p, grad in self.written.items()}

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`."""
        return {p: weighted(factors, grad) for p, grad in self.written.items()}

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return self.written.values()

    def kept(self) -> Contribution:
        """See `Contribution.kept`."""
        return self

    def of_samples(self, samples: slice | Tensor) -> KeptGrads:
        """Return those of some samples alone."""
        written = {p: grad[samples] for p, grad in self.written.items()}
        return KeptGrads(self.path, written, len(next(iter(written.values()))))

    def __add__(self, other: Contribution) -> KeptGrads:
        """Add up two uses of the same parameters, sample by sample: a norm is that of the sum."""
        total = dict(self.written)
        for p, grad in other.grads().items():
            total[p] = total[p] + grad if p in total else grad
        return KeptGrads(self.path, total, self.samples)


@dataclass(frozen=True)
class LayerUse(Contribution):
    """One call of a layer that has a rule: its input and its output's gradient."""

    path: str
    rule: LayerRule
    call: LayerCall
    samples: int = field(init=False)
    parameters: tuple[nn.Parameter, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.call.samples)
        object.__setattr__(
            self, "parameters", tuple(self.call.module._parameters[name] for name in self.call.wanted)
        )

    def grads(self) -> PerParameter:
        """See `Contribution.grads`."""
        return self._by_parameter(self.rule.grads(self.call))

    def sq_norms(self) -> PerParameter:
        """See `Contribution.sq_norms`."""
        return self._by_parameter(self.rule.sq_norms(self.call))

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`."""
        return self._by_parameter(self.rule.weighted_sum(self.call, factors))

    def norms_and_sums(self) -> tuple[PerParameter, PerParameter] | None:
        """See `Contribution.norms_and_sums`."""
        both = self.rule.norms_and_sums(self.call)
        return None if both is None else (self._by_parameter(both[0]), self._by_parameter(both[1]))

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return self.call.x, self.call.g, *self.call.saved

    def kept(self) -> Contribution:
        """Write the gradients out where the layer's rule says so."""
        if not self.rule.keeps_grads(self.call):
            return self
        return KeptGrads(self.path, self._by_parameter(self.rule.kept_grads(self.call)), self.samples)

    def of_samples(self, samples: slice | Tensor) -> LayerUse:
        """Return the use by some samples alone."""

        def some(t: Tensor) -> Tensor:
            return self.call.by_sample(t)[samples].flatten(0, 1)

        call = self.call
        fewer = replace(call, x=some(call.x), g=some(call.g), saved=tuple(map(some, call.saved)))
        return LayerUse(self.path, self.rule, fewer)

    def _by_parameter(self, named: dict[str, Tensor]) -> PerParameter:
        return {p: named[name] for name, p in zip(self.call.wanted, self.parameters, strict=True)}
