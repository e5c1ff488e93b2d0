"""The sum of per-sample weight gradients, each times a factor: how it is made, and a plan that says so."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from psgrad.conv.budget import check_budget, sum_bytes
from psgrad.conv.live import LiveKernel, live_kernel
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.ordinary import as_product, in_pieces, ordinary_weight_grad
from psgrad.conv.planner import Plan, choose, clipping_choice, seconds_of
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.scratch import scratch_like
from psgrad.conv.strategies import STRATEGIES, Cost
from psgrad.conv.strategies.base import backend_slowdown, operand_bytes, with_samples
from psgrad.errors import ConfigError

__all__ = ["plan_sum", "weighted_sum"]

WHOLE_BYTES = 32 * 2**20
"""Operands of up to so many bytes are summed over in one call, on a CPU."""
PIECE_BYTES = 16 * 2**20
"""Beyond, so many at a time: what a backend copies then stays in memory that the process has already.

Measured on 13 layers: 1.4 to 3 times faster where the operands take 49 to 110 MiB, the same at 32 MiB.
"""


@lru_cache(maxsize=4096)
def plan_sum(problem: WeightGradProblem, memory_budget: int | None = None) -> Plan:
    """Plan the weighted sum of a normalised problem, not cropped yet.

    "backend" is one `convolution_backward`, "product" a matrix product, "correlate" that strategy's
    gradients, added up. Which of them is a rule fitted to measured layers; the estimates are for reading.

    Raises
    ------
    ConfigError
        If the memory_budget is no positive int, or too small: the message has the smallest that would do.

    """
    live = _live(problem)
    inner = problem if live is None else live.problem
    by_gradients = choose(inner, "grads")
    fixed_calls = 6  # the factors
    operands = inner.samples * operand_bytes(inner)
    plain = Cost(inner.flops, 3.0 * operands, fixed_calls + 1, operands)
    costs, refusals = {}, {}
    if by_gradients.chosen == "correlate":
        own = by_gradients.costs["correlate"]
        summed = inner.samples * inner.gradient_bytes
        costs["correlate"] = replace(own, bytes=own.bytes + operands + summed, calls=own.calls + fixed_calls)
        refusals["product"] = "depthwise"
        refusals["backend"] = "its depthwise kernels are slower than making the gradients and adding them up"
    elif as_product(with_samples(inner, _fast_pieces(problem))):
        costs["product"] = plain
        refusals["correlate"] = by_gradients.refusals.get("correlate", "more expensive")
        refusals["backend"] = "a matrix product was measured to be faster on such a layer"
    else:
        costs["backend"] = replace(plain, slowdown=backend_slowdown(with_samples(inner, 1)))
        refusals["correlate"] = by_gradients.refusals.get("correlate", "more expensive")
        refusals["product"] = "a backend was measured to be faster on such a layer"
    (chosen,) = costs
    found = Plan(
        chosen,
        "weighted_sum",
        inner,
        {name: seconds_of(cost, inner) for name, cost in costs.items()},
        costs,
        refusals,
        memory_budget=memory_budget,
        clipping=clipping_choice(problem),
    )
    at_once = _at_once(problem, chosen, memory_budget)
    if at_once >= problem.samples:
        return found
    whole = costs[chosen]
    piece = replace(whole, peak_bytes=whole.peak_bytes * at_once // problem.samples)
    return replace(found, costs={chosen: piece}, at_once=at_once)


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
        part = _piece(x[rows], grad[rows], with_samples(problem, len(here)), here, found.chosen)
        total = part.to(accumulation_dtype(part.dtype)) if total is None else total.add_(part)
    assert total is not None
    return total.to(x.dtype)


def _piece(x: Tensor, grad: Tensor, problem: WeightGradProblem, factors: Tensor, how: str) -> Tensor:
    if x.is_cuda or not factors.eq(1).all():  # on CUDA, looking would cost a wait
        x, grad = _weighted(x, grad, factors, problem)
    live = _live(problem)
    if live is None:
        return _summed(x, grad, problem, how)
    return live.embed(_summed(live.crop(x), grad, live.problem, how))


def _summed(x: Tensor, grad: Tensor, problem: WeightGradProblem, how: str) -> Tensor:
    """Sum over the batch; some depthwise layers make gradients ten times faster than their sum."""
    if how == "correlate":
        return STRATEGIES[how].grads(x, grad, problem).sum(0)
    return ordinary_weight_grad(x, grad, problem)


def _weighted(x: Tensor, grad: Tensor, factors: Tensor, problem: WeightGradProblem) -> tuple[Tensor, Tensor]:
    """Multiply one of the operands by the factors, the smaller one: the gradient is linear in both."""
    rows = factors.to(x.dtype)
    if problem.rows_per_sample > 1:
        rows = rows.repeat_interleave(problem.rows_per_sample)
    rows = rows.reshape(-1, *(1,) * (x.ndim - 1))
    if x.numel() < grad.numel():
        x = torch.mul(x, rows, out=scratch_like("weighted", x))
    else:
        grad = torch.mul(grad, rows, out=scratch_like("weighted", grad))
    # 0 * inf is not 0: both operands of a removed sample are masked.
    if x.is_cuda or not factors.all():
        removed = rows == 0
        x, grad = x.masked_fill(removed, 0), grad.masked_fill(removed, 0)
    return x, grad


def _live(problem: WeightGradProblem) -> LiveKernel | None:
    # A dense layer's one position is a product, whose zeros cost less than to put them back.
    dense = problem.positions == 1 and problem.groups == 1
    return None if dense else live_kernel(problem)


def _fast_pieces(problem: WeightGradProblem) -> int:
    samples, one = problem.samples, operand_bytes(problem)
    if as_product(problem) is in_pieces:  # which copies no more than a piece
        return samples
    if problem.device.type == "cpu" and samples * one > WHOLE_BYTES:
        return max(1, PIECE_BYTES // one)
    return samples


def _at_once(problem: WeightGradProblem, how: str, memory_budget: int | None) -> int:
    """Samples at a time: so that pieces are small enough to be fast, and within the budget.

    Raises
    ------
    ConfigError
        If the budget is too small for one sample.

    """
    samples = _fast_pieces(problem)
    if memory_budget is None or problem.samples == 0:
        return samples
    check_budget(memory_budget)
    fixed, each = sum_bytes(problem, how)
    if fixed + each > memory_budget:
        raise ConfigError(
            f"memory_budget={memory_budget} bytes is too small for weighted_sum of weight "
            f"{problem.weight_shape}; the smallest that would do is {fixed + each}, one sample at a time"
        )
    return min(samples, (memory_budget - fixed) // each)
