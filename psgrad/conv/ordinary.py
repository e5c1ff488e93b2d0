"""The ordinary weight gradient, summed over the batch: a matrix product, or one `convolution_backward`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from psgrad.conv.patches import patches, patches_by_position
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.processor import halves_long_vectors
from psgrad.conv.products import add_product, batched, by_onednn, mkl_slowdown, product

__all__ = [
    "as_product",
    "in_pieces",
    "ordinary_weight_grad",
    "write_ordinary_weight_grad",
    "writes_anywhere",
]

Product = Callable[..., Tensor]
"""Of x, grad and the problem."""

FEW_POSITIONS = 4
"""Up to here a product is faster than oneDNN with any kernel; with one element, up to 16 also unfolded."""
UNFOLDED_BYTES = 32 * 2**20
"""The largest copy that a product makes."""
PIECE_BYTES = 4 * 2**20
"""Of rows that are unfolded together, where they are taken a few at a time."""
MANY_ROWS = 8
"""Of a 1-D layer with one input channel, from where unfolded products are faster."""
SMALL_BYTES = 2 * 2**20
"""The gradients of all rows, up to which a call for each takes longer than writing them."""

LEAST_ALONE, MANY_POSITIONS = 2**22, 512
"""FLOPs of one row's product, and positions of several rows, from where `_fast_in_halves`."""


def ordinary_weight_grad(
    x: Tensor, grad: Tensor, problem: WeightGradProblem, groups_factor: int = 1
) -> Tensor:
    """Weight gradient summed over all rows: `N(GO), N(GI) -> (GO)I k`.

    `x` and `grad` may be a part of the problem's rows. `groups_factor` multiplies both the groups and the
    first axis of the result, for rules that fold an axis into the channels.
    """
    if problem.weight_numel == 0:  # a backend wants channels
        return x.new_empty(problem.weight_shape[0] * groups_factor, *problem.weight_shape[1:])
    if groups_factor == 1:
        problem = _of_one_sample(problem, x.shape[0])
        product = as_product(problem)
        if product is not None:
            return product(x, grad, problem).reshape(problem.weight_shape)
    geometry = problem.geometry
    out_channels, *rest = problem.weight_shape
    shape = (out_channels * groups_factor, *rest)
    # Only the shape is read. oneDNN makes an expanded one contiguous first, up to a third of its time; a
    # block that nobody writes to costs a CPU neither memory nor time, but a GPU both.
    dummy = x.new_empty(()).expand(shape) if x.is_cuda else x.new_empty(shape)
    weight_grad = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        dummy,
        None,
        geometry.stride,
        geometry.symmetric_padding,
        geometry.dilation,
        False,
        (0,) * len(geometry.stride),
        geometry.groups * groups_factor,
        (False, True, False),
    )[1]
    # oneDNN's bfloat16 kernels leave uninitialised memory where an offset meets padding alone.
    for axis, offset in problem.padding_only_offsets:
        weight_grad.select(axis, offset).zero_()
    return weight_grad


def writes_anywhere(problem: WeightGradProblem) -> bool:
    """Whether the sum over all rows is best made by one product, which writes its result anywhere."""
    return as_product(_of_one_sample(problem, problem.samples * problem.rows_per_sample)) in (
        _per_group,
        _of_positions,
    )


def write_ordinary_weight_grad(x: Tensor, grad: Tensor, problem: WeightGradProblem, out: Tensor) -> None:
    """`ordinary_weight_grad` into `out (GO)I k`, contiguous, of a problem that `writes_anywhere`."""
    one = _of_one_sample(problem, x.shape[0])
    found = as_product(one)
    assert found is not None
    found(x, grad, one, out)


@lru_cache(maxsize=4096)
def as_product(problem: WeightGradProblem) -> Product | None:
    """Return how the sum over all rows is best made by a matrix product, or None if it is not.

    Fitted to 36 layers on a CPU: of a kernel of one element the product is up to 2.5 times faster than
    `convolution_backward`, of more elements where there are few positions; of 1-D layers with one input
    channel up to 5 times, unfolded a few rows at a time.
    """
    p = problem
    rows = p.samples * p.rows_per_sample
    if p.positions == 1:
        return _per_group
    if p.device.type == "cuda" or p.groups > 1 or rows == 0:
        return None
    slow = mkl_slowdown(p.dtype, p.device) > 1
    if slow and not halves_long_vectors():
        return _row_by_row if _fast_by_onednn(p, rows) else None
    if len(p.input_size) == 1 == p.in_per_group and rows >= MANY_ROWS and p.dtype.itemsize >= 4:
        return in_pieces
    if slow:
        return _row_by_row if _fast_in_halves(p, rows) else None
    one_element = p.geometry.kernel_positions == 1
    unfolded = rows * p.positions * p.in_per_group * p.geometry.kernel_positions * p.dtype.itemsize
    if p.positions <= (16 if one_element else FEW_POSITIONS) and unfolded <= UNFOLDED_BYTES:
        return _of_positions
    # row by row adds up in the result's own dtype
    return _row_by_row if one_element and p.dtype.itemsize >= 4 else None


def _fast_by_onednn(problem: WeightGradProblem, rows: int) -> bool:
    """Whether a product beats a convolution of the same library: no copy of x, nor of many large results."""
    p = problem
    if p.geometry.kernel_positions > 1 or max(p.geometry.stride) > 1:
        return False
    small = rows == 1 or rows * p.gradient_bytes <= SMALL_BYTES
    return small and by_onednn(p.flops / rows, p.positions, p.dtype, p.device, rows)


def _fast_in_halves(problem: WeightGradProblem, rows: int) -> bool:
    """Whether products by either library beat a convolution where long vectors are taken in halves.

    One row's took 0.3 to 0.9 of the time on twelve layers with kernels of one element, strided or not; of 8
    to 256 rows 0.2 to 0.95 from 784 positions on, 0.5 to 2 below.
    """
    p = problem
    if p.geometry.kernel_positions > 1:
        return False
    if rows == 1:
        return p.flops >= LEAST_ALONE
    return p.positions >= MANY_POSITIONS and max(p.geometry.stride) == 1


def _per_group(x: Tensor, grad: Tensor, problem: WeightGradProblem, out: Tensor | None = None) -> Tensor:
    """N G O, N G (Ik) -> G O (Ik): a convolution with one output position is a matrix product a group."""
    rows = x.shape[0]
    window = patches(x, _by_row(problem, rows), rows).squeeze(3)
    grad = grad.reshape(rows, problem.groups, problem.out_per_group)
    into = None if out is None else out.view(problem.groups, problem.out_per_group, -1)
    return batched(grad.permute(1, 2, 0), window.transpose(0, 1), into)


def _of_positions(x: Tensor, grad: Tensor, problem: WeightGradProblem, out: Tensor | None = None) -> Tensor:
    """O (NT), (NT)(Ik) -> O (Ik)."""
    left = grad.movedim(1, -1).reshape(-1, problem.out_per_group).T
    into = None if out is None else out.view(problem.out_per_group, -1)
    return product(left, patches_by_position(x, problem)[0], into)


def in_pieces(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
    """O T, T k -> O k for every row of an unfolded piece at once, added up: one input channel."""
    kernel, rows = problem.geometry.kernel_positions, x.shape[0]
    step = max(1, PIECE_BYTES // (kernel * problem.positions * problem.dtype.itemsize))
    total = grad.new_zeros(problem.out_per_group, kernel)
    for start in range(0, rows, step):
        g = grad[start : start + step].flatten(2)
        total += (g @ patches(x[start : start + step], _by_row(problem, len(g)), len(g))[:, 0].mT).sum(0)
    return total


def _row_by_row(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
    """O T, T I -> O I, added up over N without a copy of either; all at once if N gradients are small."""
    rows = x.shape[0]
    by_row = patches(x, _by_row(problem, rows), rows)[:, 0].mT
    grad = grad.flatten(2)
    if rows == 1:
        return product(grad[0], by_row[0])
    if rows * problem.gradient_bytes <= SMALL_BYTES:
        return batched(grad, by_row).sum(0)
    total = grad.new_zeros(problem.out_per_group, problem.in_per_group)
    for g, window in zip(grad, by_row, strict=True):
        add_product(total, g, window)
    return total


@lru_cache(maxsize=4096)
def _of_one_sample(problem: WeightGradProblem, rows: int) -> WeightGradProblem:
    return replace(problem, samples=1, rows_per_sample=rows)


@lru_cache(maxsize=4096)
def _by_row(problem: WeightGradProblem, rows: int) -> WeightGradProblem:
    return replace(problem, samples=rows, rows_per_sample=1)
