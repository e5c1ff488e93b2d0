"""Small gradients of many parameters, side by side in one matrix: a call of an operator for all of them.

A layer's bias or affine map has so few elements that calling operators takes the time, not the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psgrad.capture.contribution import PerParameter
from psgrad.layers.base import squared_norms, weighted

__all__ = ["SideBySide", "is_small", "side_by_side"]

SMALL = 2**17
"""Elements of a parameter's per-sample gradients, N P, up to which they are copied beside others."""


@dataclass(frozen=True)
class SideBySide:
    """Gradients `[N, P_1 + P_2 + ..]` of several parameters.

    Attributes
    ----------
    parameters
        Whose; P_i elements each.
    rows
        The gradients, of one dtype.

    """

    parameters: tuple[nn.Parameter, ...]
    rows: Tensor

    def grads(self) -> PerParameter:
        """Every parameter's `[N, P_i]`, views."""
        columns = self.rows.split([p.numel() for p in self.parameters], 1)
        return dict(zip(self.parameters, columns, strict=True))

    def sq_norms(self) -> Tensor:
        """Squared norms `[N]` over all of them, float32 at least."""
        return squared_norms(self.rows)

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `psgrad.capture.contribution.Contribution.weighted_sum`."""
        total = weighted(factors, self.rows).split([p.numel() for p in self.parameters])
        return {p: part.view(p.shape) for p, part in zip(self.parameters, total, strict=True)}


def is_small(grads: Tensor) -> bool:
    """Whether gradients `[N, *shape]` are so few that they are better taken beside others."""
    return grads.numel() <= SMALL


def side_by_side(grads: PerParameter) -> list[SideBySide]:
    """Return the gradients `[N, *shape]` side by side, those of one dtype and device together."""
    alike: dict[tuple[torch.dtype, torch.device], PerParameter] = {}
    for p, grad in grads.items():
        alike.setdefault((grad.dtype, grad.device), {})[p] = grad
    return [
        SideBySide(
            tuple(some), torch.cat([grad.reshape(len(grad), p.numel()) for p, grad in some.items()], 1)
        )
        for some in alike.values()
    ]
