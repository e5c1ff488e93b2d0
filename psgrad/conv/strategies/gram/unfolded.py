"""S from the patches themselves, where windows hardly overlap: unfolding then copies little twice."""

from __future__ import annotations

from math import prod

from torch import Tensor

from psgrad.conv.patches import patches
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.gram.positions import gram

__all__ = ["few_overlap", "unfolded", "unfolded_cost"]


LESS = 1.5
"""Kernel elements a residue class of the stride, up to which one Gram matrix takes less than one a class.

On eleven strided layers of 1 to 64 samples it took 0.22 to 0.8 of the time in 1-D (2/2, 3/2), 0.66 to 1.07 in
2-D (2x2/2); with 2.25 elements a class (3x3/2) 0.7 to 1.5.
"""


def few_overlap(problem: WeightGradProblem) -> bool:
    """Whether strided windows overlap so little that unfolding is less than a Gram matrix a residue class."""
    geometry = problem.geometry
    assert geometry.kernel_size is not None
    classes = prod(map(min, geometry.kernel_size, geometry.stride))
    return classes > 1 and geometry.kernel_positions <= LESS * classes


def unfolded(x: Tensor, problem: WeightGradProblem) -> Tensor:
    """Gram matrix of the patches: `(NK)(GI)U.. -> (NG) (KT) (KT)`."""
    return gram(patches(x, problem, problem.samples).flatten(0, 1))


def unfolded_cost(problem: WeightGradProblem) -> tuple[float, float, int]:
    """FLOPs and elements moved for one sample, and calls for a chunk."""
    p = problem
    window = float(p.groups * p.in_per_group * p.geometry.kernel_positions)
    side = p.rows_per_sample * p.positions
    return 2.0 * side**2 * window, window * side, 2
