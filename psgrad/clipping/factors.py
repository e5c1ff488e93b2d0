"""What a per-sample gradient of a given norm is multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["automatic_factors", "clip_factors"]


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """Return `min(1, max_norm / norm)` per sample, and 0 where the norm is not finite.

    Parameters
    ----------
    norms
        `[N]`.
    max_norm
        C > 0; inf asks for factors of 1.

    Guarantees
    ----------
    `factors * norms <= C (1 + 1e-6)`; a norm of 0 has factor 1.

    """
    factors = (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(norms))


def automatic_factors(norms: Tensor, max_norm: float, gamma: float) -> Tensor:
    """Return `max_norm / (norm + gamma)` per sample, and 0 where the norm is not finite.

    Parameters
    ----------
    norms
        `[N]`.
    max_norm
        C > 0, finite.
    gamma
        Positive: keeps a gradient of norm 0 at 0, and small ones in order of their length.

    Guarantees
    ----------
    `factors * norms < C (1 + 1e-6)`.

    """
    return torch.where(norms.isfinite(), max_norm / (norms + gamma), torch.zeros_like(norms))
