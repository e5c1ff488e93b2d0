"""What an ensemble's members contribute together: `[K, N]` where a model's contribution has `[N]`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from psgrad.capture import Contribution, PerParameter
from psgrad.conv.factors import remove_some
from psgrad.layers.base import accumulation_dtype

__all__ = ["MemberContribution", "MemberKept"]


class MemberContribution(Contribution):
    """Per-sample gradients `[K, N, *shape]` of stacked parameters `[K, *shape]`; samples is N."""

    def plus(self, other: Contribution) -> Contribution:
        """See `Contribution.plus`."""
        total = dict(self.grads())
        for p, grad in other.grads().items():
            total[p] = total[p] + grad if p in total else grad
        return MemberKept(self.path, total, self.samples)


@dataclass(frozen=True)
class MemberKept(MemberContribution):
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
        """See `Contribution.sq_norms`; `[K, N]`."""
        return {p: _squared_norms(grad) for p, grad in self.written.items()}

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`; `factors` is `[K, N]`, and member k's sum in entry k."""
        return {p: _weighted(factors, grad) for p, grad in self.written.items()}

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return self.written.values()

    def kept(self) -> Contribution:
        """See `Contribution.kept`."""
        return self


def _squared_norms(grads: Tensor) -> Tensor:
    """KN.. -> KN, accumulated in float32 at least."""
    return torch.linalg.vector_norm(_flat(grads), dim=2, dtype=accumulation_dtype(grads.dtype)).square()


def _weighted(factors: Tensor, grads: Tensor) -> Tensor:
    """`sum_n factors[k, n] * grads[k, n]`: KN, KN.. -> K..; a factor of exactly 0 removes its sample."""
    rows = _flat(grads)
    if remove_some(factors):
        rows = rows.masked_fill((factors == 0).unsqueeze(2), 0)
    return torch.bmm(factors.to(grads.dtype).unsqueeze(1), rows).reshape(len(grads), *grads.shape[2:])


def _flat(grads: Tensor) -> Tensor:
    """KN.. -> KNP, also of no samples and of scalars."""
    return grads.reshape(*grads.shape[:2], prod(grads.shape[2:]))
