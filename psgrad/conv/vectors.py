"""How long the vectors of a CPU are, which decides what a backend has kernels for."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["short_vectors"]


@lru_cache(maxsize=1)
def short_vectors() -> bool:
    """Whether PyTorch runs with vectors of 8 floats (AVX2), not 16 (AVX-512)."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"
