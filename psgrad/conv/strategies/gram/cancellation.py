"""Norms from two Gram matrices, and which of them cancellation has spoiled.

Rounding leaves an error of about `1e-7 / sqrt(terms)` of the magnitude of what is added up. A squared norm
that is a small share of it is computed again, directly, so that what stays is good to 1e-4 and never lost: a
norm that comes out low would leave a sample unclipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eaten", "norms_of_grams"]

CANCELLATION = 1e-3
"""The share of the magnitude below which a squared norm is computed again."""


def norms_of_grams(d: Tensor, s: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """`sum D[t,t'] S[t,t']` over t, t' and groups: (NG)TT, (NG)TT -> N; and what is left above the share.

    |D[t,t']| <= sqrt(D[t,t] D[t',t']), and S likewise: of what is added up the magnitude is at most
    `(sum_t sqrt(D[t,t] S[t,t]))^2`.
    """
    norms = torch.linalg.vecdot(d.flatten(1), s.flatten(1))
    diagonal = d.diagonal(dim1=1, dim2=2) * s.diagonal(dim1=1, dim2=2)
    magnitude = torch.linalg.vector_norm(diagonal, 0.5, dim=1)
    if groups > 1:
        norms, magnitude = (t.reshape(-1, groups).sum(1) for t in (norms, magnitude))
    return norms, torch.sub(norms, magnitude, alpha=CANCELLATION)


def eaten(left: Tensor) -> list[int]:
    """Samples of which nothing is left. NaN is not among them: it stays, for the caller to see."""
    if not left.numel() or float(left.min()) >= 0:  # of most batches this is all there is to do
        return []
    return (left < 0).nonzero().flatten().tolist()
