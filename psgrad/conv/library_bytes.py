"""What libraries make within a call, beside the tensors that are seen: upper bounds, for one sample."""

from __future__ import annotations

from math import prod

import torch

from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.problem import WeightGradProblem

__all__ = [
    "backend_bytes",
    "backend_unfolds",
    "numel_of_blocks",
    "numel_of_operands",
    "numel_of_x",
    "unfolded_bytes",
]

BLOCK = 16
"""Channels that a backend's layout rounds up to, in every group."""


def backend_bytes(one: WeightGradProblem) -> int:
    """Bytes that a backend's convolution may make: operands in blocks of channels or unfolded, gradients."""
    wide = accumulation_dtype(one.dtype).itemsize
    unfolded = unfolded_bytes(one) if backend_unfolds(one) else 0
    numbers = numel_of_operands(one, 1) + numel_of_operands(one, BLOCK) + numel_of_blocks(one)
    return unfolded + wide * (numbers + 3 * one.weight_numel)


def unfolded_bytes(problem: WeightGradProblem) -> int:
    """Bytes of one sample's unfolded x."""
    p = problem
    window = p.groups * p.in_per_group * p.geometry.kernel_positions
    return p.dtype.itemsize * window * p.rows_per_sample * p.positions


def backend_unfolds(problem: WeightGradProblem) -> bool:
    """Whether a backend may have no kernel of its own."""
    return len(problem.input_size) == 3 or problem.dtype not in (torch.float32, torch.bfloat16)


def numel_of_blocks(problem: WeightGradProblem) -> int:
    """Elements of the weight, the channels of a group rounded up."""
    p = problem
    return p.groups * _up(p.out_per_group) * _up(p.in_per_group) * p.geometry.kernel_positions


def numel_of_x(problem: WeightGradProblem, block: int) -> int:
    """Of one sample's x with its padding, the channels of a group rounded up."""
    p = problem
    sizes = [size + sum(pair) for size, pair in zip(p.input_size, p.geometry.padding, strict=True)]
    return p.groups * _up(p.in_per_group, block) * p.rows_per_sample * prod(sizes)


def numel_of_operands(problem: WeightGradProblem, block: int) -> int:
    """Elements of one sample's x and grad, the channels of a group rounded up."""
    p = problem
    grad = p.groups * _up(p.out_per_group, block) * p.rows_per_sample * p.positions
    return numel_of_x(p, block) + grad


def _up(channels: int, block: int = BLOCK) -> int:
    return -(-channels // block) * block
