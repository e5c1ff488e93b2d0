"""Matrix products, by the faster of the two libraries that PyTorch has for them on a CPU.

PyTorch multiplies float32 matrices with Intel's MKL, which on other makers' processors stays with vectors of
8 floats where there are 16. oneDNN, which convolves, does not: on two cores of an AMD EPYC with AVX-512
(Zen 5) a product of 1536 x 1536 x 1536 ran at 216 GFLOP/s by the one and at 460 by the other. PyTorch's own
`nn.Linear` calls oneDNN by the same operator when it is compiled.

Where the CPU itself takes 16 floats in two halves (Zen 4), it is 200 and 219 GFLOP/s. But MKL shares a single
product among threads badly there: oneDNN took 0.5 to 0.95 of its time from 2**24 FLOPs on; but 0.9 to 1.7
where the left factor is transposed, and 0.9 to 1.4 of several products, which threads take whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.processor import halves_long_vectors, mkl_is_slow
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
SLOWDOWN, SLOWDOWN_IN_HALVES = 1.5, 1.05
"""Of MKL's products, where it is slow, and where long vectors are taken in halves: fitted to which strategy
is the fastest on 432 and on 340 problems."""


def mkl_slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How many times slower than by oneDNN MKL makes products of this dtype, which matter in a choice."""
    if dtype != torch.float32 or device.type != "cpu" or not mkl_is_slow():
        return 1.0
    return SLOWDOWN_IN_HALVES if halves_long_vectors() else SLOWDOWN


def by_onednn(flops_each: float, inner: int, dtype: torch.dtype, device: torch.device, products: int) -> bool:
    """Whether so many products of so many FLOPs each, adding up so many elements, are left to oneDNN."""
    if flops_each < LARGE or mkl_slowdown(dtype, device) == 1:
        return False
    return products == 1 if halves_long_vectors() else inner >= LEAST_INNER


def slowdown_of_products(
    flops_each: float, inner: int, dtype: torch.dtype, device: torch.device, products: int
) -> float:
    """How many times slower than by the better library such products are made here."""
    left = by_onednn(flops_each, inner, dtype, device, products)
    return 1.0 if left else mkl_slowdown(dtype, device)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`M K @ K J -> M J`, into `out` if there is one."""
    if not _is_left_to_onednn(left, right):
        return left @ right if out is None else torch.mm(left, right, out=out)
    found = _by_onednn(left, right)
    return found if out is None else out.copy_(found)


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
    *batch, rows, inner = left.shape
    flops_each = 2.0 * rows * inner * right.shape[-1]
    return (
        by_onednn(flops_each, inner, left.dtype, left.device, batch[0] if batch else 1)
        and (left.stride(-1) == 1 or not halves_long_vectors())
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
