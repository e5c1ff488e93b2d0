"""The Gram matrix over a tensor's positions, of every sample and group."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.problem import WeightGradProblem

__all__ = ["gram", "positions_gram"]


def positions_gram(t: Tensor, problem: WeightGradProblem, positions: int) -> Tensor:
    """(NK)(GC)T -> (NG) (KT) (KT)."""
    n, k, groups = problem.samples, problem.rows_per_sample, problem.groups
    if n == 0:
        return t.new_zeros(0, k * positions, k * positions)
    if k == 1:
        return gram(t.reshape(n * groups, -1, positions))
    by_row = t.reshape(n, k, groups, t.shape[1] // groups, positions)
    return gram(by_row.permute(0, 2, 3, 1, 4).reshape(n * groups, t.shape[1] // groups, k * positions))


def gram(columns: Tensor) -> Tensor:
    """B C T -> B T T."""
    if columns.shape[2] == 1:  # a batch of dot products is slow as a batch of matrix products
        columns = columns.flatten(1)
        return torch.linalg.vecdot(columns, columns).reshape(-1, 1, 1)
    return torch.bmm(columns.mT, columns)  # `@` takes a dozen of calls to come here
