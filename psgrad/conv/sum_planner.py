"""Planning the weighted sum; and what clipping does with a layer: keep its gradients, or sum again."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from psgrad.conv.backend import ordinary_slowdown
from psgrad.conv.budget import check_budget, sum_bytes
from psgrad.conv.live import LiveKernel, live_kernel, worth_cropping
from psgrad.conv.ordinary import as_product, in_pieces
from psgrad.conv.planner import ClippingChoice, Plan, choose, rates_of, seconds_of
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.products import mkl_slowdown
from psgrad.conv.strategies import STRATEGIES, Cost
from psgrad.errors import ConfigError

__all__ = ["ONCE", "clipping_choice", "live_in_sum", "plan_sum", "ways_of_sum"]

ONCE = ("backend", "product")
"""The ways that make one ordinary weight gradient, of operands that were weighed."""

WHOLE_BYTES = 32 * 2**20
"""Operands of up to so many bytes are summed over in one call, on a CPU."""
PIECE_BYTES = 16 * 2**20
"""Beyond, so many at a time: what a backend copies then stays in memory that the process has already.

Measured on 13 layers: 1.4 to 3 times faster where the operands take 49 to 110 MiB, the same at 32 MiB.
"""

SUM_BY_GRADIENTS = 1.3
"""Times the time of norms, by which a sum by the same gradients is judged against one ordinary gradient.

Measured on 409 layers and batch sizes: at 1, and with five calls fewer, the choice takes 1.059x the time of
the best way in geometric mean, and is within 10 % of it on 77 %; as it is, 1.020x, and on 92 %.
"""

FRESH_BYTES = 10 * 2**20
"""A layer's gradients on a CPU beyond this are taken to come from the system with pages never touched."""
FRESH_RATE = 3.5e9
"""Bytes/s at which such pages are touched for the first time."""


@lru_cache(maxsize=4096)
def plan_sum(problem: WeightGradProblem, memory_budget: int | None = None) -> Plan:
    """Plan the weighted sum of a normalised problem, not cropped yet.

    One of the operands times the factors, and then the ordinary weight gradient: "backend" is one
    `convolution_backward`, "product" a matrix product, and which of the two a rule fitted to measured
    layers. Or a strategy's gradients, a few samples at a time, times the factors and added up: of layers
    with small weights and many positions that moves less.

    Raises
    ------
    ConfigError
        If the memory_budget is no positive int, or too small: the message has the smallest that would do.

    """
    live = live_in_sum(problem)
    inner = problem if live is None else live.problem
    costs, refusals = ways_of_sum(inner)
    seconds = {name: seconds_of(cost, inner) for name, cost in costs.items()}
    chosen = min(seconds, key=lambda name: seconds[name])
    found = Plan(chosen, "weighted_sum", inner, seconds, costs, refusals, clipping=clipping_choice(problem))
    if problem.samples == 0:
        return found
    at_once = problem.samples
    if memory_budget is not None:
        found, at_once = _within(memory_budget, found, problem)
    if found.chosen in ONCE:
        at_once = min(at_once, _fast_pieces(inner))
    if at_once >= problem.samples:
        return found
    whole = found.costs[found.chosen]
    if found.chosen in ONCE:  # a strategy knows its own chunks
        piece = replace(whole, peak_bytes=whole.peak_bytes * at_once // problem.samples)
        found = replace(found, costs=found.costs | {found.chosen: piece})
    return replace(found, at_once=at_once)


@lru_cache(maxsize=4096)
def clipping_choice(problem: WeightGradProblem) -> ClippingChoice:
    """Estimate whether clipping should write this layer's per-sample gradients out and keep them.

    Clipping needs the norm of every sample's whole gradient before it can add any up. Either the
    gradients are made once, squared and later summed; or the norms are computed, x and the output's
    gradient kept, and one weighted sum follows.
    """
    rates = rates_of(problem)
    result = problem.samples * problem.gradient_bytes
    cropped = worth_cropping(problem, problem.samples)
    grads = choose(problem if cropped is None else cropped.problem, "kept")
    keep = grads.seconds[grads.chosen] + 2 * (result / rates.bytes + rates.call)
    if problem.device.type != "cuda" and result > FRESH_BYTES:
        keep += result / FRESH_RATE
    live = live_kernel(problem)
    problem = problem if live is None else live.problem
    norms = choose(problem, "sq_norms")
    costs, _ = ways_of_sum(problem)
    weighted = min(seconds_of(cost, problem) for cost in costs.values())
    return ClippingChoice(grads.chosen, norms.chosen, result, keep, norms.seconds[norms.chosen], weighted)


def live_in_sum(problem: WeightGradProblem) -> LiveKernel | None:
    """Return how a weighted sum crops the kernel, or None if it does not."""
    if problem.positions > 1 or problem.groups > 1:
        return worth_cropping(problem, 1)
    # A dense layer's one position is a product, whose zeros cost less than to put them back: but for zeros
    # around single elements, where MKL is slow (512-512 3x3 @1, 4 to 128 samples: 0.12 to 0.37 of the time).
    live = live_kernel(problem)
    single = live is not None and live.problem.geometry.kernel_positions == 1
    return live if single and mkl_slowdown(problem.dtype, problem.device) > 1 else None


def ways_of_sum(problem: WeightGradProblem) -> tuple[dict[str, Cost], dict[str, str]]:
    """Return what each way of making the sum would cost, and why the others are none."""
    costs, refusals = {}, {}
    once, other = ("product", "backend") if _is_product(problem) else ("backend", "product")
    operands = problem.samples * problem.operand_bytes
    # one operand is weighed first, and both are read
    costs[once] = Cost(
        problem.flops, 2.0 * operands, 6, operands, 1.0 if once == "product" else ordinary_slowdown(problem)
    )
    refusals[other] = f"{once} was measured to be faster on such a layer"
    for name, strategy in STRATEGIES.items():
        reason = strategy.refusal(problem, "kept")
        if reason is None and problem.device.type == "cuda":
            reason = "sums by gradients were not measured on a GPU"
        if reason is not None:
            refusals[name] = reason
            continue
        # gradients of a chunk are added up in about the time in which they are squared; and a total besides
        own = strategy.cost(problem, "sq_norms")
        costs[name] = replace(
            own,
            bytes=SUM_BY_GRADIENTS * (own.bytes + 2 * problem.gradient_bytes),
            calls=own.calls + 7,
            slowdown=SUM_BY_GRADIENTS * own.slowdown,
        )
    return costs, refusals


def _is_product(problem: WeightGradProblem) -> bool:
    return as_product(problem.with_samples(_fast_pieces(problem))) is not None


def _fast_pieces(problem: WeightGradProblem) -> int:
    samples, one = problem.samples, problem.operand_bytes
    if as_product(problem) is in_pieces:  # which copies no more than a piece
        return samples
    if problem.device.type == "cpu" and samples * one > WHOLE_BYTES:
        return max(1, PIECE_BYTES // one)
    return samples


def _within(memory_budget: int, found: Plan, problem: WeightGradProblem) -> tuple[Plan, int]:
    """Return the fastest way that the budget allows, and how many samples it allows at a time.

    Raises
    ------
    ConfigError
        If no way can do with it.

    """
    check_budget(memory_budget)
    bounds = {name: sum_bytes(problem, name) for name in found.seconds}
    fits = [name for name, (fixed, each) in bounds.items() if fixed + each <= memory_budget]
    if not fits:
        least = min(bounds, key=lambda name: sum(bounds[name]))
        raise ConfigError(
            f"memory_budget={memory_budget} bytes is too small for weighted_sum of weight "
            f"{problem.weight_shape} of one sample at a time; the smallest that would do is "
            f"{sum(bounds[least])}, by {least!r}"
        )
    chosen = min(fits, key=lambda name: found.seconds[name])
    fixed, each = bounds[chosen]
    over = {
        name: f"one sample takes {sum(bounds[name])} bytes of temporaries, over the budget"
        for name in found.seconds
        if name not in fits
    }
    within = replace(
        found,
        chosen=chosen,
        seconds={name: found.seconds[name] for name in fits},
        costs={name: found.costs[name] for name in fits},
        refusals=found.refusals | over,
        memory_budget=memory_budget,
    )
    return within, (memory_budget - fixed) // each
