"""Memory budgets: the most bytes of temporaries that a strategy makes for a sample."""

from __future__ import annotations

from math import prod

import torch

from psgrad.conv.live import live_kernel, worth_cropping
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.ordinary import as_product
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies import STRATEGIES, Strategy, Verb
from psgrad.conv.strategies.base import with_samples
from psgrad.errors import ConfigError

__all__ = ["check_budget", "sample_bytes", "sum_bytes"]

BLOCK = 16
"""Channels that a backend's layout rounds up to, in every group."""


def check_budget(memory_budget: int) -> None:
    """See that a budget is a positive number of bytes.

    Raises
    ------
    ConfigError
        If it is not.

    """
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget <= 0:
        raise ConfigError(
            f"memory_budget={memory_budget!r}: give a positive int, in bytes, or None for no limit"
        )


def sample_bytes(strategy: Strategy, problem: WeightGradProblem, verb: Verb) -> int:
    """Most bytes of temporaries for one sample: n samples together take at most n times as much.

    An upper bound that the tests hold against measured peaks. Whatever a library may make within a call
    (operands in blocks of channels, in another dtype, unfolded) is counted as if all were alive at once; on
    CUDA a library's workspace is not counted.

    Parameters
    ----------
    strategy
        One that serves the problem.
    problem
        As `normalise` returns it, before it is cropped to what is alive.
    verb
        What is to be computed.

    """
    live = live_kernel(problem) if verb == "sq_norms" else worth_cropping(problem, problem.samples)
    # padded unevenly, then cropped; and the gradient with its zeros, before it is stored
    door = problem.dtype.itemsize * 2 * _elements_of_x(problem, 1) + problem.gradient_bytes
    return door + _strategy_bytes(strategy, with_samples(problem if live is None else live.problem, 1), verb)


def _strategy_bytes(strategy: Strategy, one: WeightGradProblem, verb: Verb) -> int:
    wide = accumulation_dtype(one.dtype).itemsize
    gradient, operands = wide * one.weight_numel, wide * _operands(one, 1)
    own = strategy.cost(one, verb).peak_bytes
    if strategy.name == "gram":  # whose gradient is made only where a norm is computed again
        return 2 * own + 2 * operands + 2 * gradient
    if strategy.name == "triton":
        return own + operands + 2 * gradient
    unfolded = _unfolded_bytes(one)
    if strategy.name == "unfold":
        copies = 2 if one.dtype.itemsize >= 4 else 3
        return own + copies * unfolded + 2 * operands + 3 * gradient
    unfolded = unfolded if _backend_unfolds(one) else 0
    return own + operands + wide * (_operands(one, BLOCK) + _blocks(one)) + unfolded + 3 * gradient


def sum_bytes(problem: WeightGradProblem, how: str) -> tuple[int, int]:
    """Most bytes of temporaries of a weighted sum: whatever the number of samples, and for each of them.

    Bounds like those of `sample_bytes`.

    Parameters
    ----------
    problem
        As `normalise` returns it, before it is cropped to what is alive.
    how
        "backend", "product", or the strategy whose gradients are added up.

    """
    one, wide = with_samples(problem, 1), accumulation_dtype(problem.dtype).itemsize
    gradient = wide * one.weight_numel
    if how in STRATEGIES:  # cropped or not; without the samples that are removed
        own = _strategy_bytes(STRATEGIES[how], one, "sq_norms")
        return 4 * gradient, own + gradient + one.dtype.itemsize * 2 * _elements_of_x(one, 1)
    product = how == "product" or as_product(one) is not None  # pieces may be small enough for one
    # padded unevenly, cropped, times the factors, masked
    each = one.dtype.itemsize * (2 * _elements_of_x(one, 1) + 3 * _operands(one, 1))
    each += wide * (_operands(one, 1) + _operands(one, BLOCK))
    if product:
        each += gradient
    if product or _backend_unfolds(one):
        each += 2 * _unfolded_bytes(one)
    return 4 * gradient + wide * _blocks(one), each


def _unfolded_bytes(problem: WeightGradProblem) -> int:
    p = problem
    window = p.groups * p.in_per_group * p.geometry.kernel_positions
    return p.dtype.itemsize * window * p.rows_per_sample * p.positions


def _backend_unfolds(problem: WeightGradProblem) -> bool:
    """Whether a backend may have no kernel of its own."""
    return len(problem.input_size) == 3 or problem.dtype not in (torch.float32, torch.bfloat16)


def _blocks(problem: WeightGradProblem) -> int:
    """Elements of the weight, the channels of a group rounded up."""
    p = problem
    return p.groups * _up(p.out_per_group) * _up(p.in_per_group) * p.geometry.kernel_positions


def _elements_of_x(problem: WeightGradProblem, block: int) -> int:
    """Of one sample's x with its padding, the channels of a group rounded up."""
    p = problem
    sizes = [size + sum(pair) for size, pair in zip(p.input_size, p.geometry.padding, strict=True)]
    return p.groups * _up(p.in_per_group, block) * p.rows_per_sample * prod(sizes)


def _operands(problem: WeightGradProblem, block: int) -> int:
    """Elements of one sample's x and grad, the channels of a group rounded up."""
    p = problem
    grad = p.groups * _up(p.out_per_group, block) * p.rows_per_sample * p.positions
    return _elements_of_x(p, block) + grad


def _up(channels: int, block: int = BLOCK) -> int:
    return -(-channels // block) * block
