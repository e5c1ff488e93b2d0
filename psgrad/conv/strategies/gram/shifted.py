"""S as a sum of shifted copies of R, axis by axis, one residue class modulo the stride at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import torch.nn.functional as F
from torch import Tensor

from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.gram.positions import positions_gram

__all__ = ["largest_phase", "shift_cost", "shifted"]


@dataclass(frozen=True)
class _Phase:
    """One residue class of input positions on one axis: its residue and its shifts of the output."""

    residue: int
    shifts: tuple[int, ...]


def shifted(x: Tensor, problem: WeightGradProblem) -> Tensor:
    """Gram matrix of the patches: `(NK)(GI)U.. -> (NG) (KT) (KT)`."""
    p = problem
    padding = [end for size in reversed(p.geometry.symmetric_padding) for end in (size, size)]
    padded = F.pad(x, padding) if any(padding) else x
    first, *others = (_shifted_sum(padded, p, phases) for phases in product(*_phases(p)))
    positions = p.rows_per_sample * p.positions
    return sum(others, first).reshape(-1, positions, positions)


def shift_cost(problem: WeightGradProblem) -> tuple[float, float, int]:
    """FLOPs and elements moved for one sample, and calls for a chunk."""
    p = problem
    flops, moved, calls = 0.0, 0.0, 0
    for phases in product(*_phases(p)):
        sizes = _phase_sizes(p, phases)
        if max(p.geometry.stride) > 1:  # a residue class is copied
            moved += p.rows_per_sample * p.groups * p.in_per_group * prod(sizes)
        flops += 2.0 * (p.rows_per_sample * prod(sizes)) ** 2 * p.groups * p.in_per_group
        for axis in reversed(range(len(sizes))):
            adds = (p.rows_per_sample * prod(sizes[:axis]) * prod(p.output_size[axis:])) ** 2
            moved += 1.5 * adds * len(phases[axis].shifts) * p.groups
            calls += len(phases[axis].shifts)
    return flops, moved, calls


def largest_phase(problem: WeightGradProblem) -> int:
    """Most input positions of a residue class."""
    return max(prod(_phase_sizes(problem, phases)) for phases in product(*_phases(problem)))


def _shifted_sum(padded: Tensor, problem: WeightGradProblem, phases: tuple[_Phase, ...]) -> Tensor:
    """Sum of the shifted R of one residue class: `N G (K T..) (K T'..)`."""
    p = problem
    sizes = _phase_sizes(p, phases)
    for axis, (phase, size) in enumerate(zip(phases, sizes, strict=True)):
        step = p.geometry.stride[axis]
        padded = padded.narrow(axis + 2, phase.residue, (size - 1) * step + 1)[
            (slice(None),) * (axis + 2) + (slice(None, None, step),)
        ]
    gram = positions_gram(padded, p, prod(sizes))
    k, rank = p.rows_per_sample, len(sizes)
    gram = gram.reshape(-1, k, *sizes, k, *sizes)
    for axis in reversed(range(rank)):
        left, right, out = 2 + axis, 3 + rank + axis, p.output_size[axis]
        first, *others = (gram.narrow(left, q, out).narrow(right, q, out) for q in phases[axis].shifts)
        gram = sum(others, first)
    return gram


def _phases(problem: WeightGradProblem) -> list[list[_Phase]]:
    """Return for each axis the residue classes that some kernel offset reaches, in padded coordinates."""
    geometry = problem.geometry
    assert geometry.kernel_size is not None
    axes = []
    for kernel, stride, dilation in zip(
        geometry.kernel_size, geometry.stride, geometry.dilation, strict=True
    ):
        shifts: dict[int, list[int]] = {}
        for d in range(kernel):
            shift, residue = divmod(dilation * d, stride)
            shifts.setdefault(residue, []).append(shift)
        axes.append([_Phase(residue, tuple(q)) for residue, q in shifts.items()])
    return axes


def _phase_sizes(problem: WeightGradProblem, phases: tuple[_Phase, ...]) -> tuple[int, ...]:
    """Input positions of a residue class that some output position reads, per axis."""
    return tuple(out + max(phase.shifts) for out, phase in zip(problem.output_size, phases, strict=True))
