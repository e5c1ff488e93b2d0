"""From a strategy's name to the strategy, and the plan that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.live import live_kernel
from psgrad.conv.measured import measure
from psgrad.conv.planner import Plan, choose
from psgrad.conv.problem import WeightGradProblem, normalise
from psgrad.conv.strategies import STRATEGIES, Strategy, Verb
from psgrad.errors import StrategyError

__all__ = ["check_strategy", "plan", "resolve"]

PLANNED: dict[str, Callable[[WeightGradProblem, Verb], Plan]] = {"auto": choose, "measure": measure}
"""Names that stand for a choice: by cost, and by timing once."""


def plan(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    verb: Verb,
    *,
    strategy: str = "auto",
    rows_per_sample: int = 1,
) -> Plan:
    """Say which strategy `weight_grads` ("grads") or `weight_grad_sq_norms` ("sq_norms") would take.

    Takes the arguments of these functions; reads shapes only. The same problem gives the same plan. With
    strategy="measure" the candidates are timed, the first time a machine meets the problem.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    StrategyError
        If the verb does not exist.

    """
    if verb not in ("grads", "sq_norms"):
        raise StrategyError(f'no verb {verb!r}: there are "grads" and "sq_norms"')
    if strategy not in PLANNED:
        raise StrategyError(f"strategy {strategy!r} leaves nothing to plan: use {' or '.join(PLANNED)}")
    problem = normalise(x, grad_output, weight_shape, geometry, rows_per_sample)[2]
    live = live_kernel(problem)
    return PLANNED[strategy](problem if live is None else live.problem, verb)


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
