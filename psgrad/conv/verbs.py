"""The three verbs for a convolution's weight: per-sample gradients, squared norms, weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from psgrad.conv.at_once import sq_norms_and_sum
from psgrad.conv.choice import plan_within, resolve
from psgrad.conv.chunking import chunks
from psgrad.conv.factors import forget
from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.live import live_kernel, worth_cropping
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.problem import normalise, problem_of
from psgrad.conv.strategies import Verb
from psgrad.conv.sum_planner import clipping_choice
from psgrad.conv.weighted import weighted_sum
from psgrad.errors import ShapeError

__all__ = [
    "clipping_keeps_grads",
    "kept_weight_grads",
    "weight_grad_sq_norms",
    "weight_grad_sq_norms_and_sum",
    "weight_grads",
    "weighted_weight_grad",
]


P = ParamSpec("P")
R = TypeVar("R")


def _verb(compute: Callable[P, R]) -> Callable[P, R]:
    """Without gradients, and in the dtype of the operands, whatever autocast is on."""

    @wraps(compute)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0] if args else kwargs["x"]
        assert isinstance(x, Tensor)
        with torch.no_grad():
            if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # meta tensors know no autocast
                return compute(*args, **kwargs)
            with torch.autocast(x.device.type, enabled=False):
                return compute(*args, **kwargs)

    return run


@_verb
def weight_grads(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    strategy: str = "auto",
    *,
    rows_per_sample: int = 1,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute the weight gradient of every sample.

    Parameters
    ----------
    x
        Input `[(N K), C_in, *spatial]`, any memory layout.
    grad_output
        Gradient of the output `[(N K), C_out, *spatial]`, of the dtype and device of x.
    weight_shape
        `[C_out, C_in / groups, *kernel]`; transposed `[C_in, C_out / groups, *kernel]`.
    geometry
        Of the convolution.
    strategy
        "auto" for the planner's choice, "measure" to time the candidates the first time a machine meets
        the problem, or a name of `psgrad.conv.strategies.STRATEGIES`.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample.
    memory_budget
        Bytes that temporaries may take beside the result, None for no limit: samples are then taken so
        many at a time, by the fastest strategy that can. Counted is what this call makes, on a CPU with
        what its libraries make within it (blocks of up to 4 MiB that earlier calls left are not).

    Returns
    -------
    Tensor
        `[N, *weight_shape]` of the dtype of x, contiguous, detached: entry n is the gradient of
        rows n K to (n + 1) K alone. An empty batch gives `[0, *weight_shape]`.

    Raises
    ------
    ConfigError
        If the memory_budget is no positive int, or too small: the message has the smallest that would do.
    ShapeError
        If the shapes do not fit.
    StrategyError
        If the strategy does not exist or refuses.

    Notes
    -----
    Inf or NaN in grad_output that meets padding makes NaN, as `0 * inf` does, in a strategy that multiplies
    the padding's zeros and nothing in one that passes over them, so norms, sums and gradients may then
    disagree on which entries are finite.

    """
    if memory_budget is not None:
        operands = x, grad_output, weight_shape, geometry
        return _within_budget(weight_grads, "grads", memory_budget, operands, strategy, rows_per_sample)
    x, grad_output, problem = normalise(x, grad_output, weight_shape, geometry, rows_per_sample)
    live = worth_cropping(problem, problem.samples)
    if live is None:
        return resolve(strategy, problem, "grads").grads(x, grad_output, problem)
    grads = resolve(strategy, live.problem, "grads").grads(live.crop(x), grad_output, live.problem)
    return live.embed(grads).contiguous()  # which axes of one element may not be: they pass for channels last


@_verb
def kept_weight_grads(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    *,
    rows_per_sample: int = 1,
) -> Tensor:
    """As `weight_grads`, dense, but in any order of the axes in memory: for who only squares and sums."""
    x, grad_output, problem = normalise(x, grad_output, weight_shape, geometry, rows_per_sample)
    live = worth_cropping(problem, problem.samples)
    if live is None:
        return resolve("auto", problem, "kept").kept(x, grad_output, problem)
    grads = resolve("auto", live.problem, "kept").kept(live.crop(x), grad_output, live.problem)
    return live.embed(grads)


@_verb
def weight_grad_sq_norms(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    strategy: str = "auto",
    *,
    rows_per_sample: int = 1,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute the squared L2 norm of every sample's weight gradient, never all gradients at once.

    Arguments, errors and notes are those of `weight_grads`.

    Returns
    -------
    Tensor
        `[N]`, float64 for float64 operands and float32 for all others.

    """
    if memory_budget is not None:
        operands = x, grad_output, weight_shape, geometry
        return _within_budget(
            weight_grad_sq_norms, "sq_norms", memory_budget, operands, strategy, rows_per_sample
        )
    x, grad_output, problem = normalise(x, grad_output, weight_shape, geometry, rows_per_sample)
    live = live_kernel(problem)
    if live is not None:
        x, problem = live.crop(x), live.problem
    return resolve(strategy, problem, "sq_norms").sq_norms(x, grad_output, problem)


@_verb
def weight_grad_sq_norms_and_sum(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    *,
    rows_per_sample: int = 1,
) -> tuple[Tensor, Tensor]:
    """Compute every sample's squared norm, and the ordinary weight gradient, at little more than its price.

    Gradients of a few samples at a time are squared and added up; or both are computed on their own, where
    that is estimated to be faster. Arguments and errors are those of `weight_grads`.

    Returns
    -------
    tuple[Tensor, Tensor]
        `[N]` as of `weight_grad_sq_norms`; and the sum over all samples `[*weight_shape]`, of the dtype of x,
        zeros for an empty batch.

    """
    x, grad_output, problem = normalise(x, grad_output, weight_shape, geometry, rows_per_sample)
    if problem.samples == 0:
        return x.new_empty(0, dtype=accumulation_dtype(x.dtype)), x.new_zeros(problem.weight_shape)
    return sq_norms_and_sum(x, grad_output, problem)


def _within_budget(
    compute: Callable[..., Tensor],
    verb: Verb,
    memory_budget: int,
    operands: tuple[Tensor, Tensor, Sequence[int], ConvGeometry],
    strategy: str,
    rows_per_sample: int,
) -> Tensor:
    """Compute a verb of so many samples at a time as the budget takes."""
    x, grad_output, *shape = operands
    problem = problem_of(*operands, rows_per_sample)
    found = plan_within(memory_budget, strategy, problem, verb)
    if found.at_once is None or found.at_once >= problem.samples:
        return compute(*operands, found.chosen, rows_per_sample=rows_per_sample)
    result: Tensor | None = None
    for _, rows, here in chunks(problem, found.at_once):
        part = compute(x[rows], grad_output[rows], *shape, found.chosen, rows_per_sample=rows_per_sample)
        if result is None:
            result = part.new_empty(problem.samples, *part.shape[1:])
        result[here] = part
        del part  # before the next is made
    assert result is not None
    return result


@_verb
def weighted_weight_grad(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    factors: Tensor,
    *,
    rows_per_sample: int = 1,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute `sum_n factors[n] * grads[n]` at the price of one ordinary weight gradient.

    A factor of exactly 0 removes its sample, also one whose gradient is not finite. Where padding meets what
    is not finite, see the notes of `weight_grads`.

    Parameters
    ----------
    x, grad_output, weight_shape, geometry, rows_per_sample, memory_budget
        As for `weight_grads`.
    factors
        `[N]`.

    Returns
    -------
    Tensor
        `[*weight_shape]`, of the dtype of x.

    Raises
    ------
    ConfigError
        If the memory_budget is no positive int, or too small: the message has the smallest that would do.
    ShapeError
        If the shapes do not fit.

    """
    x, grad_output, problem = normalise(x, grad_output, weight_shape, geometry, rows_per_sample)
    if factors.shape != (problem.samples,):
        raise ShapeError(f"factors {tuple(factors.shape)} for {problem.samples} samples")
    forget()
    if problem.samples == 0:
        return x.new_zeros(problem.weight_shape)
    return weighted_sum(x, grad_output, problem, factors, memory_budget)


def clipping_keeps_grads(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    *,
    rows_per_sample: int = 1,
) -> bool:
    """Whether clipping this layer is faster with its per-sample gradients written out and kept.

    See `psgrad.conv.sum_planner.clipping_choice`. Arguments and errors are those of `weight_grads`; only
    shapes are read.
    """
    return clipping_choice(problem_of(x, grad_output, weight_shape, geometry, rows_per_sample)).keeps
