"""From a strategy's name to the strategy, and the plan that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from psgrad.conv.budget import check_budget, sample_bytes
from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.live import live_for
from psgrad.conv.measured import measure
from psgrad.conv.planner import Plan, choose
from psgrad.conv.problem import WeightGradProblem, problem_of
from psgrad.conv.strategies import STRATEGIES, Strategy, Verb
from psgrad.conv.sum_planner import plan_sum
from psgrad.errors import ConfigError, StrategyError

__all__ = ["check_strategy", "plan", "plan_within", "resolve"]

PLANNED: dict[str, Callable[[WeightGradProblem, Verb], Plan]] = {"auto": choose, "measure": measure}
"""Names that stand for a choice: by cost, and by timing once."""


def plan(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    verb: Verb | Literal["weighted_sum"],
    *,
    strategy: str = "auto",
    rows_per_sample: int = 1,
    memory_budget: int | None = None,
) -> Plan:
    """Say how `weight_grads` ("grads"), `weight_grad_sq_norms` or `weighted_weight_grad` would compute.

    The verbs are "grads", "sq_norms" and "weighted_sum". The plan of a weighted sum also says whether
    clipping takes it, after the norms, or keeps the gradients (`Plan.clipping`).

    Takes the arguments of these functions; reads shapes only. The same problem gives the same plan. With
    strategy="measure" the candidates are timed, the first time a machine meets the problem. With a
    memory_budget, those are left out of which a single sample takes more.

    Raises
    ------
    ConfigError
        If the memory_budget is no positive int, or too small for every strategy: the message has the
        smallest that would do.
    ShapeError
        If the shapes do not fit.
    StrategyError
        If the verb does not exist, or the strategy is neither "auto" nor, but for a sum, "measure".

    """
    if verb not in ("grads", "sq_norms", "weighted_sum"):
        raise StrategyError(f'no verb {verb!r}: there are "grads", "sq_norms" and "weighted_sum"')
    if strategy not in PLANNED:
        raise StrategyError(f"strategy {strategy!r} leaves nothing to plan: use {' or '.join(PLANNED)}")
    problem = problem_of(x, grad_output, weight_shape, geometry, rows_per_sample)
    if verb == "weighted_sum":
        if strategy != "auto":
            raise StrategyError(f"strategy={strategy!r}: the weighted sum is planned by rule, use 'auto'")
        if memory_budget is not None:
            check_budget(memory_budget)
        return plan_sum(problem, memory_budget)
    if memory_budget is not None:
        return plan_within(memory_budget, strategy, problem, verb)
    live = live_for(problem, verb)
    return PLANNED[strategy](problem if live is None else live.problem, verb)


def plan_within(memory_budget: int, strategy: str, problem: WeightGradProblem, verb: Verb) -> Plan:
    """Plan a normalised problem so that temporaries stay within a budget, a few samples at a time if need be.

    Parameters
    ----------
    memory_budget
        In bytes.
    strategy
        "auto", or a name.
    problem
        Before it is cropped to what is alive.
    verb
        "grads" or "sq_norms".

    Raises
    ------
    ConfigError
        If the budget is no positive int; if it is too small for the strategy, or under "auto" for all:
        the message has the smallest that would do; if strategy is "measure", which times whole batches.
    StrategyError
        If there is no such strategy, or it was named and refuses.

    """
    check_budget(memory_budget)
    if strategy == "measure":
        raise ConfigError('strategy="measure" times whole batches, over any memory_budget: use "auto"')
    live = live_for(problem, verb)
    inner = problem if live is None else live.problem
    found = choose(inner, verb)
    if strategy != "auto":
        resolve(strategy, inner, verb)
    if problem.samples == 0:
        return found
    every = {name: sample_bytes(STRATEGIES[name], problem, verb) for name in found.seconds}
    asked = every if strategy == "auto" else {strategy: every[strategy]}
    fits = [name for name, size in asked.items() if size <= memory_budget]
    if not fits:
        least = min(every, key=lambda name: every[name])
        who = (
            "every strategy"
            if strategy == "auto"
            else f"strategy {strategy!r}, which takes {every[strategy]},"
        )
        raise ConfigError(
            f"memory_budget={memory_budget} bytes is too small for {who} to make {verb} of weight "
            f"{problem.weight_shape} of one sample; the smallest that would do is {every[least]}, "
            f"with strategy {least!r}"
        )
    chosen = min(fits, key=lambda name: found.seconds[name])
    over = {
        name: f"one sample takes {size} bytes of temporaries, over the budget"
        for name, size in every.items()
        if size > memory_budget
    }
    return replace(
        found,
        chosen=chosen,
        seconds={name: s for name, s in found.seconds.items() if name not in over},
        costs={name: cost for name, cost in found.costs.items() if name not in over},
        refusals=found.refusals | over,
        memory_budget=memory_budget,
        at_once=min(problem.samples, memory_budget // every[chosen]),
    )


def check_strategy(name: str) -> None:
    """See that a strategy of this name exists.

    Raises
    ------
    StrategyError
        If it does not; the message has the names that do.

    """
    if name not in PLANNED and name not in STRATEGIES:
        raise StrategyError(f"no strategy {name!r}: there are {', '.join([*PLANNED, *STRATEGIES])}")


def resolve(name: str, problem: WeightGradProblem, verb: Verb) -> Strategy:
    """Return the strategy of this name, or the planned one for "auto" and "measure".

    Raises
    ------
    StrategyError
        If there is no such strategy, or it was named and refuses.

    """
    check_strategy(name)
    if name in PLANNED:
        return STRATEGIES[PLANNED[name](problem, verb).chosen]
    strategy = STRATEGIES[name]
    reason = strategy.refusal(problem, verb)
    if reason is not None:
        raise StrategyError(f"strategy {name!r} refuses {verb} of weight {problem.weight_shape}: {reason}")
    return strategy
