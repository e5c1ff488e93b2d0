"""The sum of per-sample weight gradients, each times a factor, as `psgrad.conv.sum_planner` plans it."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.factors import are_ones, remove_some
from psgrad.conv.numerics import accumulation_dtype, per_row
from psgrad.conv.ordinary import ordinary_weight_grad
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.scratch import scratch_like
from psgrad.conv.strategies import STRATEGIES
from psgrad.conv.sum_planner import ONCE, live_in_sum, plan_sum

__all__ = ["weighted_sum"]


def weighted_sum(
    x: Tensor, grad: Tensor, problem: WeightGradProblem, factors: Tensor, memory_budget: int | None
) -> Tensor:
    """`sum_n factors[n] * grads[n]` of a normalised problem of at least one sample."""
    found = plan_sum(problem, memory_budget)
    if found.at_once is None:
        return _piece(x, grad, problem, factors, found.chosen)
    k, step = problem.rows_per_sample, found.at_once
    total: Tensor | None = None
    for start in range(0, problem.samples, step):
        rows = slice(start * k, (start + step) * k)
        here = factors[start : start + step]
        part = _piece(x[rows], grad[rows], problem.with_samples(len(here)), here, found.chosen)
        total = part.to(accumulation_dtype(part.dtype)) if total is None else total.add_(part)
    assert total is not None
    return total.to(x.dtype)


def _piece(x: Tensor, grad: Tensor, problem: WeightGradProblem, factors: Tensor, how: str) -> Tensor:
    """Sum over a piece of the batch in one of the ways."""
    live = live_in_sum(problem)
    inner = problem if live is None else live.problem
    if how in ONCE:
        if not are_ones(factors):
            x, grad = _weighted(x, grad, factors, problem)
        total = ordinary_weight_grad(x if live is None else live.crop(x), grad, inner)
    else:
        total = STRATEGIES[how].weighted_sum(x if live is None else live.crop(x), grad, inner, factors)
    return total if live is None else live.embed(total)


def _weighted(x: Tensor, grad: Tensor, factors: Tensor, problem: WeightGradProblem) -> tuple[Tensor, Tensor]:
    """Multiply one of the operands by the factors, the smaller one: the gradient is linear in both."""
    rows = per_row(factors, x, problem.rows_per_sample)
    if x.numel() < grad.numel():
        x = torch.mul(x, rows, out=scratch_like("weighted", x))
    else:
        grad = torch.mul(grad, rows, out=scratch_like("weighted", grad))
    # 0 * inf is not 0: both operands of a removed sample are masked.
    if remove_some(factors):
        removed = rows == 0
        x, grad = x.masked_fill(removed, 0), grad.masked_fill(removed, 0)
    return x, grad
