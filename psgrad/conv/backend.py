"""How fast a backend's convolutions make weight gradients, against a good matrix product."""

from __future__ import annotations

from dataclasses import replace

from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.products import mkl_slowdown

__all__ = ["backend_slowdown", "ordinary_slowdown"]


def backend_slowdown(problem: WeightGradProblem) -> float:
    """How many times slower than a matrix product a backend's convolutions make per-sample gradients.

    Fitted, with the strategies' bytes and calls, to the CPU times of 620 problems: oneDNN vectorises over
    channels, and loses what a group has not; a batch of one it parallelises best, if it is not strided, but
    of 3-D layers unfolds it; 1-D layers are slow; of depthwise layers it knows 3x3 kernels best. For CUDA
    nothing was fitted yet.
    """
    p, rank = problem, len(problem.input_size)
    if p.device.type == "cuda":
        return 3.0
    if p.weight_numel == 0:
        return 1.0
    if p.in_per_group == 1 and p.out_per_group < 8 and p.groups > 1:
        return 12.0 if p.geometry.kernel_size == (3, 3) else 32.0 if rank == 1 else 45.0
    slow_products = mkl_slowdown(p.dtype, p.device) > 1
    slowdown = 2.0 if rank == 1 and (p.in_per_group == 1 or not slow_products) else 1.0
    if p.samples == p.rows_per_sample == 1 and rank == 2 and max(p.geometry.stride) > 1:
        slowdown = 1.25
    elif slow_products and p.samples == p.rows_per_sample == 1 and rank == 2 and 32 < p.positions <= 64:
        slowdown = 1.5
    elif p.samples == 1 and rank == 3 and p.geometry.kernel_positions > 1 and p.in_per_group >= 16:
        dear = slow_products and p.rows_per_sample == 1
        slowdown = 1 + (200 if dear else 50) / p.out_per_group  # the price of an unfolded copy
    if p.out_per_group < 8:
        return slowdown * (50.0 if p.out_per_group < 4 else 20.0)
    if p.in_per_group == 8 and p.dtype.itemsize <= 4:  # a part of a vector of them, and a kernel of its own
        return slowdown * (1.5 if p.dtype.itemsize == 4 else 8.0)
    if p.in_per_group < 16 and p.samples > 1:
        return slowdown * max(1.0, 192 / p.out_per_group)
    return slowdown * (2.0 if p.out_per_group < 16 else 1.0)


def ordinary_slowdown(problem: WeightGradProblem) -> float:
    """How many times slower than a good matrix product a backend makes the sum over all of the problem."""
    p = problem
    one = backend_slowdown(replace(p, samples=1, rows_per_sample=p.samples * p.rows_per_sample))
    slow_alone = len(p.input_size) == 1 and p.groups == 1  # as 1-D layers are
    if p.in_per_group == 1 and mkl_slowdown(p.dtype, p.device) > 1:
        slow_alone = False
    return one / 2 if slow_alone else one
