"""What a backward pass clipped, and what a logical step gathered."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ClipResult", "Gathered"]


@dataclass(frozen=True)
class ClipResult:
    """What one backward pass clipped.

    Attributes
    ----------
    norms
        `[N]`, of an ensemble `[K, N]`: norms of the samples' own gradients before clipping, over all
        trainable parameters.
    factors
        Of the same shape: what each was multiplied by, in the group where it is smallest; 0 for a gradient
        that is not finite, which is left out of every group.
    l2_bound
        The most that one sample can change the clipped *sum* by, in L2 norm: what noise is scaled to.
    group_norms, group_factors
        The same by group of parameters (`Group.path`); one group "" but in the style "per_layer".
    passes
        How often backward ran through the module: 1, or 2 where a memory budget asked for it, and more where
        that had to be found out.

    """

    norms: Tensor
    factors: Tensor
    l2_bound: float
    group_norms: dict[str, Tensor] = field(default_factory=dict)
    group_factors: dict[str, Tensor] = field(default_factory=dict)
    passes: int = 1

    @property
    def clipped(self) -> Tensor:
        """Bool, as `norms`: the samples whose gradient was made shorter, or is not finite."""
        return self.factors < 1

    @property
    def non_finite(self) -> Tensor:
        """Bool, as `norms`: the samples that were left out because their gradient is not finite."""
        return ~self.norms.isfinite()


@dataclass(frozen=True)
class Gathered:
    """What `.grad` has gathered since the last logical step.

    Attributes
    ----------
    l2_bound
        The most that one sample can have changed the gathered sum by: what noise is scaled to.
    backward_passes
        How many were clipped. 0 means that `.grad` holds nothing that is bounded.
    samples, non_finite
        Scalars, int64: samples seen, and those left out; in an ensemble once a member. Private, as they
        depend on the drawn batch.

    """

    l2_bound: float
    backward_passes: int
    samples: Tensor
    non_finite: Tensor

    @classmethod
    def nothing(cls, l2_bound: float) -> Gathered:
        """Return what a step starts from."""
        return cls(l2_bound, 0, torch.tensor(0, device="cpu"), torch.tensor(0, device="cpu"))
