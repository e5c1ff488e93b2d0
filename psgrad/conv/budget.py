"""Memory budgets: the most bytes of temporaries that a strategy makes for a sample."""

from __future__ import annotations

from psgrad.conv.library_bytes import (
    BLOCK,
    backend_unfolds,
    numel_of_blocks,
    numel_of_operands,
    numel_of_x,
    unfolded_bytes,
)
from psgrad.conv.live import live_for
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.ordinary import as_product
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies import STRATEGIES, Strategy, Verb
from psgrad.errors import ConfigError

__all__ = ["check_budget", "sample_bytes", "sum_bytes"]


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
    live = live_for(problem, verb)
    # padded unevenly, then cropped; and the gradient with its zeros, before it is stored
    door = problem.dtype.itemsize * 2 * numel_of_x(problem, 1) + problem.gradient_bytes
    one = (problem if live is None else live.problem).with_samples(1)
    return door + strategy.bytes_of_one(one, verb)


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
    one, wide = problem.with_samples(1), accumulation_dtype(problem.dtype).itemsize
    gradient = wide * one.weight_numel
    if how in STRATEGIES:  # cropped or not; without the samples that are removed
        own = STRATEGIES[how].bytes_of_one(one, "sq_norms")
        return 4 * gradient, own + gradient + one.dtype.itemsize * 2 * numel_of_x(one, 1)
    product = how == "product" or as_product(one) is not None  # pieces may be small enough for one
    # padded unevenly, cropped, times the factors, masked
    each = one.dtype.itemsize * (2 * numel_of_x(one, 1) + 3 * numel_of_operands(one, 1))
    each += wide * (numel_of_operands(one, 1) + numel_of_operands(one, BLOCK))
    if product:
        each += gradient
    if product or backend_unfolds(one):
        each += 2 * unfolded_bytes(one)
    return 4 * gradient + wide * numel_of_blocks(one), each
