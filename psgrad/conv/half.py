"""Half precision on a CPU: most have no instructions for its products, which are then emulated."""

from __future__ import annotations

from functools import lru_cache

import torch

from psgrad.conv.processor import short_vectors

__all__ = ["emulated", "is_emulated"]

INSTRUCTIONS = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
"""Of `torch.cpu`, what tells that there are some; not in every version."""


def emulated() -> float:
    """Times as long as in float32 takes a product that is emulated.

    Two cores with AVX-512 alone: 366 GFLOP/s in float32, 63 in bfloat16. Two with AVX2: 142, and 1.4.
    """
    return 100.0 if short_vectors() else 5.5


@lru_cache(maxsize=64)
def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products of this dtype are emulated there."""
    if dtype not in INSTRUCTIONS or device.type != "cpu":
        return False
    found = [getattr(torch.cpu, name, None) for name in INSTRUCTIONS[dtype]]
    return not any(supported is not None and supported() for supported in found)
