"""Norms and the plain sum at once: where nobody clips, no factor has to be waited for."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from psgrad.conv.constants import as_it_is
from psgrad.conv.live import live_kernel
from psgrad.conv.planner import choose, seconds_of
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies import STRATEGIES, Cost
from psgrad.conv.sum_planner import ways_of_sum
from psgrad.conv.weighted import weighted_sum

__all__ = ["at_once", "sq_norms_and_sum"]


def sq_norms_and_sum(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> tuple[Tensor, Tensor]:
    """Squared norms `[N]` and the sum `[*weight_shape]` of a normalised problem of at least one sample."""
    live = live_kernel(problem)
    cropped, inner = (x, problem) if live is None else (live.crop(x), live.problem)
    how = at_once(inner)
    if how is None:
        norms = STRATEGIES[choose(inner, "sq_norms").chosen].sq_norms(cropped, grad, inner)
        return norms, weighted_sum(x, grad, problem, _ones(problem.samples, x.dtype, x.device), None)
    norms, total = STRATEGIES[how].sq_norms_and_sum(cropped, grad, inner)
    return norms, total if live is None else live.embed(total)


@lru_cache(maxsize=4096)
def at_once(problem: WeightGradProblem) -> str | None:
    """Return whose gradients are squared and added up, or None for norms, and one ordinary gradient beside.

    Parameters
    ----------
    problem
        Cropped to what is alive.

    """
    if problem.dtype.itemsize < 4:
        return None  # each gradient would be rounded to half precision before it is added
    costs, _ = ways_of_sum(problem)
    norms = choose(problem, "sq_norms")
    apart = norms.seconds[norms.chosen] + min(seconds_of(cost, problem) for cost in costs.values())
    together = {
        name: seconds_of(_read_again(cost, problem), problem)
        for name, cost in costs.items()
        if name in STRATEGIES
    }
    best = min(together, key=lambda name: together[name], default=None)
    return best if best is not None and together[best] < apart else None


def _read_again(cost: Cost, problem: WeightGradProblem) -> Cost:
    """Return the cost of a sum by gradients that are squared as well."""
    return replace(cost, bytes=cost.bytes + problem.samples * problem.gradient_bytes, calls=cost.calls + 2)


@lru_cache(maxsize=16)
@as_it_is
def _ones(samples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(samples, dtype=dtype, device=device)
