"""In which precision sums are kept."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "squared_norms"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norm `[N]` of each row of `[N, P]`, accumulated in float32 at least."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulation_dtype(rows.dtype))
    return norms.square()
