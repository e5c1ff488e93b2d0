"""One call of a layer for all K members, as one call of one member's layer on K times the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from psgrad.capture import Contribution, PerParameter
from psgrad.conv.factors import remove_some
from psgrad.ensemble.members import with_tensors
from psgrad.ensemble.per_sample.contribution import MemberContribution, MemberKept
from psgrad.ensemble.value import Layout, Value
from psgrad.layers import LayerCall, LayerRule
from psgrad.layers.conv import Convolution
from psgrad.layers.linear import Linear

__all__ = ["MemberUse"]


@dataclass(frozen=True)
class MemberUse(MemberContribution):
    """K members' use of one layer.

    A weight of member k meets only member k's samples. So the per-sample gradients of K members over N
    samples are those of one layer over K N samples, whatever the layer; its rule gives them, and none of its
    formulas asks for the weight itself. Only the sum over samples is by member.

    Attributes
    ----------
    rule
        The layer's.
    layer
        With its stacked parameters.
    x, g
        Its input and its output's gradient.
    rows_per_sample
        The consecutive rows of a member's batch that make one sample.
    wanted
        Names of the layer's own parameters whose gradients are asked for.

    """

    path: str
    rule: LayerRule
    layer: nn.Module
    x: Value
    g: Value
    rows_per_sample: int
    wanted: tuple[str, ...]

    @property
    def samples(self) -> int:  # type: ignore[override]  # read-only here
        """N."""
        return self.x.shape[0] // self.rows_per_sample

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:  # type: ignore[override]  # read-only here
        """See `Contribution`; stacked."""
        return tuple(p for name in self.wanted if (p := self.layer._parameters[name]) is not None)

    def grads(self) -> PerParameter:
        """See `Contribution.grads`; `[K, N, *shape]`."""
        if self._over_shared_data is None:
            return self._verb(self.rule.grads)
        found = self.rule.grads(self._over_shared_data)
        # N(KO).. -> KNO..
        return self._by_parameter(
            {name: grad.unflatten(1, (self.x.members, -1)).movedim(1, 0) for name, grad in found.items()}
        )

    def sq_norms(self) -> PerParameter:
        """See `Contribution.sq_norms`; `[K, N]`."""
        return self._verb(self.rule.sq_norms)

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`; `factors` is `[K, N]`, and member k's sum in entry k."""
        if type(self.rule) is Linear:
            return self._by_parameter(self._linear_sums(factors))
        calls = zip(self._calls(), factors, strict=True)
        return self._stacked([self.rule.weighted_sum(call, own) for call, own in calls])

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return self.x.tensor, self.g.tensor

    def kept(self) -> Contribution:
        """Write the gradients out where the layer's rule says so."""
        if not self.rule.keeps_grads(self._over_shared_data or self._call):
            return self
        return MemberKept(self.path, self.grads(), self.samples)

    def _linear_sums(self, factors: Tensor) -> dict[str, Tensor]:
        """K products of one shape in one call."""
        rows = factors.repeat_interleave(self.rows_per_sample, 1)
        g, x = self._apart(self._call.g), self._apart(self._call.x).to(self.g.tensor.dtype)
        # KN -> KN1..
        rows = rows.to(g.dtype).reshape(*rows.shape, *(1,) * (g.ndim - 2))
        if remove_some(factors):  # 0 * inf is not 0
            g, x = g.masked_fill(rows == 0, 0), x.masked_fill(rows == 0, 0)
        # KN..O, KN..I -> K(N..)O, K(N..)I
        g, x = (g * rows).flatten(1, -2), x.flatten(1, -2)
        return {"weight": torch.bmm(g.mT, x), "bias": g.sum(1)}

    @cached_property
    def _over_shared_data(self) -> LayerCall | None:
        """The call as one of a convolution with K times the outputs, `N(KO)..`, if it is that."""
        one = self.x.layout is Layout.SHARED and type(self.rule) is Convolution and self.layer.groups == 1
        if not one:
            return None
        module = with_tensors(self.layer, lambda p: p.detach().flatten(0, 1), lambda b: b)
        return LayerCall(module, self.x.tensor, self.g.as_folded(), self.rows_per_sample, self.wanted)

    @cached_property
    def _by_member(self) -> bool:
        """Whether rows are `(KN)`, or `(NK)` as a folded value lies; rows of a sample have to be together."""
        return self.rows_per_sample > 1 or Layout.STACKED in (self.x.layout, self.g.layout)

    @cached_property
    def _call(self) -> LayerCall:
        """The call as one of member 0's layer, on the rows of all members."""
        return LayerCall(
            self._member(0), self._rows(self.x), self._rows(self.g), self.rows_per_sample, self.wanted
        )

    @property
    def _differs(self) -> bool:
        """Whether the rule asks for more of the layer than all members have in common."""
        return any(True for _ in self.layer.buffers())

    def _calls(self) -> list[LayerCall]:
        """Every member's own."""
        parts = zip(self._apart(self._call.x), self._apart(self._call.g), strict=True)
        return [
            replace(self._call, module=self._member(k) if self._differs else self._call.module, x=x, g=g)
            for k, (x, g) in enumerate(parts)
        ]

    def _verb(self, verb: Callable[[LayerCall], dict[str, Tensor]]) -> PerParameter:
        if self._differs:
            return self._stacked([verb(call) for call in self._calls()])
        return self._by_parameter({name: self._apart(found) for name, found in verb(self._call).items()})

    def _member(self, k: int) -> nn.Module:
        return with_tensors(self.layer, lambda p: p.detach()[k], lambda b: b[k])

    def _rows(self, value: Value) -> Tensor:
        """(KN).. or (NK).., a view where that is the order in which the value lies."""
        if self._by_member:
            return value.as_stacked().flatten(0, 1)
        split = value.as_split()
        return split.expand(-1, value.members, *(-1,) * (split.ndim - 2)).flatten(0, 1)

    def _apart(self, t: Tensor) -> Tensor:
        """(KN).. or (NK).. -> KN..; of rows or of samples."""
        each = t.shape[0] // self.x.members
        if self._by_member:
            return t.unflatten(0, (self.x.members, each))
        return t.unflatten(0, (each, self.x.members)).transpose(0, 1)

    def _stacked(self, found: list[dict[str, Tensor]]) -> PerParameter:
        return self._by_parameter({name: torch.stack([own[name] for own in found]) for name in self.wanted})

    def _by_parameter(self, named: dict[str, Tensor]) -> PerParameter:
        return {p: named[name] for name, p in zip(self.wanted, self.parameters, strict=True)}
