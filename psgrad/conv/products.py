"""Matrix products, by the faster of the two libraries that PyTorch has for them on a CPU.

PyTorch multiplies float32 matrices with Intel's MKL, which on other makers' processors stays with vectors of
8 floats where there are 16. oneDNN, which convolves, does not: on two cores of an AMD EPYC with AVX-512 a
product of 1536 x 1536 x 1536 ran at 216 GFLOP/s by the one and at 460 by the other. PyTorch's own `nn.Linear`
calls oneDNN by the same operator when it is compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.processor import mkl_is_slow
from psgrad.conv.scratch import is_plain_cpu

__all__ = [
    "add_product",
    "batched",
    "by_onednn",
    "mkl_slowdown",
    "product",
    "slowdown_of_products",
]

LARGE = 2**24
"""FLOPs of one product from where oneDNN's call, one a product, is worth it.

Over 715 products of 8 to 4608 rows and columns: 1.2 times MKL's time from 2**22, 0.81 from 2**24, 0.5
from 2**28.
"""
LEAST_INNER = 48
"""Elements that are added up for each result, from where a copy of the results is worth it."""
SLOWDOWN = 1.5
"""Of MKL's products, where it is slow: fitted to which strategy is the fastest on 432 problems."""


def mkl_slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How many times slower than by oneDNN MKL makes products of this dtype, which matter in a choice."""
    return SLOWDOWN if dtype == torch.float32 and device.type == "cpu" and mkl_is_slow() else 1.0


def by_onednn(flops_each: float, inner: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of so many FLOPs each, adding up so many elements, are left to oneDNN."""
    return mkl_slowdown(dtype, device) > 1 and flops_each >= LARGE and inner >= LEAST_INNER


def slowdown_of_products(flops_each: float, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """How many times slower than by the better library such products are made here."""
    return 1.0 if by_onednn(flops_each, inner, dtype, device) else mkl_slowdown(dtype, device)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`M K @ K J -> M J`."""
    return _by_onednn(left, right) if _is_left_to_onednn(left, right) else left @ right


def batched(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`B M K @ B K J -> B M J`, into `out` if there is one."""
    if not _is_left_to_onednn(left, right):
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    if out is None:
        if len(left) == 1:
            return _by_onednn(left[0], right[0]).unsqueeze(0)
        out = left.new_empty(len(left), left.shape[1], right.shape[2])
    for a, b, result in zip(left, right, out, strict=True):
        result.copy_(_by_onednn(a, b))
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`M J += M K @ K J`."""
    if _is_left_to_onednn(left, right):
        total += _by_onednn(left, right)
    else:
        total.addmm_(left, right)


def _is_left_to_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether these are plain large matrices, on a machine where that matters, and nobody records them."""
    rows, inner = left.shape[-2:]
    return (
        by_onednn(2.0 * rows * inner * right.shape[-1], inner, left.dtype, left.device)
        and right.dtype == left.dtype
        and not torch.compiler.is_compiling()
        and is_plain_cpu(left)
        and is_plain_cpu(right)
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and torch._C._get_mkldnn_enabled()
    )


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    if not (right.is_contiguous() or right.mT.is_contiguous()):  # many strides would do, but not all
        right = right.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")
