"""The planner: pure, complete, and able to say why."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from psgrad.conv import ConvGeometry, Plan, choice, clipping_keeps_grads, half, plan, planner, weight_grads
from psgrad.conv.strategies import STRATEGIES, Cost, Strategy
from psgrad.errors import StrategyError
from tests.problems import ConvProblem, conv_problems

ARGUMENTS = (torch.zeros(8, 4, 9, 9), torch.zeros(8, 6, 9, 9), (6, 4, 3, 3), ConvGeometry(3, padding=1))


def test_the_table_is_literal_and_names_its_strategies() -> None:
    assert {"loop", "grouped", "unfold"} <= set(STRATEGIES)
    for name, strategy in STRATEGIES.items():
        assert isinstance(strategy, Strategy)
        assert strategy.name == name


@pytest.mark.parametrize("verb", ["grads", "sq_norms"])
@given(problem=conv_problems())
def test_every_strategy_is_either_priced_or_refused(verb: str, problem: ConvProblem) -> None:
    found = plan(*problem.operands, verb)
    assert found.seconds.keys() == found.costs.keys()
    assert set(found.costs) | set(found.refusals) == set(STRATEGIES)
    assert not set(found.costs) & set(found.refusals)
    assert found.seconds[found.chosen] == min(found.seconds.values())
    for cost in found.costs.values():
        assert min(cost.flops, cost.bytes, cost.calls, cost.peak_bytes) >= 0
        assert cost.slowdown >= 1


@given(problem=conv_problems())
def test_the_same_problem_has_the_same_plan(problem: ConvProblem) -> None:
    """Shapes alone decide: other values, and tensors without any, change nothing."""
    x, grad, shape, geometry = problem.operands
    first = plan(x, grad, shape, geometry, "grads")
    assert plan(torch.zeros_like(x), torch.zeros_like(grad), shape, geometry, "grads") == first
    assert plan(x, grad, shape, geometry, "grads") == first
    without_values = plan(x.to("meta"), grad.to("meta"), shape, geometry, "grads")
    assert without_values.costs == first.costs


@pytest.mark.parametrize("verb", ["grads", "sq_norms"])
def test_a_plan_says_what_was_chosen_what_it_costs_and_why_not_the_others(verb: str) -> None:
    found = plan(*ARGUMENTS, verb)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{verb} of a convolution: N=8")
    assert "kernel=(3, 3)" in lines[0]
    assert lines[1].startswith(f"-> {found.chosen}")
    assert "GFLOP" in lines[1]
    assert [line for line in lines if line.startswith("->")] == lines[1:2]
    assert len(lines) == 1 + len(STRATEGIES)
    for name, reason in found.refusals.items():
        assert any(name in line and reason in line for line in lines)


def test_rows_per_sample_are_planned_too() -> None:
    found = plan(*ARGUMENTS, "grads", rows_per_sample=len(ARGUMENTS[0]))
    assert (found.problem.samples, found.problem.rows_per_sample) == (1, len(ARGUMENTS[0]))


def test_refusals_are_told() -> None:
    x, grad, *rest = ARGUMENTS
    found = plan(x[:0], grad[:0], *rest, "grads")
    assert "empty batch" in found.refusals["grouped"]
    assert "refused: an empty batch" in str(found)
    assert found.chosen != "grouped"


class Priced(Strategy):
    """Refuses by verb, costs a given number of calls, and gives zeros."""

    def __init__(self, name: str, calls: int, refuses: str = "") -> None:
        self.name = name
        self.calls = calls
        self.refuses = refuses

    def refusal(self, problem, verb):
        return f"no {verb} today" if verb == self.refuses else None

    def cost(self, problem, verb):
        return Cost(flops=0, bytes=0, calls=self.calls, peak_bytes=0)

    def grads(self, x, grad, problem):
        return x.new_full((problem.samples, *problem.weight_shape), float(self.calls))


def test_auto_takes_the_cheapest_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    priced = (Priced("cheap", 1, refuses="sq_norms"), Priced("middle", 2), Priced("dear", 3))
    for module in (planner, choice):
        monkeypatch.setattr(module, "STRATEGIES", {strategy.name: strategy for strategy in priced})
    monkeypatch.setitem(choice.PLANNED, "auto", planner.choose.__wrapped__)  # a cache is for the real table
    assert plan(*ARGUMENTS, "grads").chosen == "cheap"
    assert plan(*ARGUMENTS, "sq_norms").chosen == "middle"
    assert plan(*ARGUMENTS, "sq_norms").refusals == {"cheap": "no sq_norms today"}
    assert (weight_grads(*ARGUMENTS) == 1).all()
    assert (weight_grads(*ARGUMENTS, "dear") == 3).all()


def test_a_verb_that_does_not_exist_raises() -> None:
    with pytest.raises(StrategyError, match=r"'weighted'.*grads.*sq_norms.*weighted_sum"):
        plan(*ARGUMENTS, "weighted")


def test_a_plan_is_frozen() -> None:
    found = plan(*ARGUMENTS, "grads")
    assert isinstance(found, Plan)
    with pytest.raises(AttributeError):
        found.chosen = "other"


def test_clipping_keeps_small_results_and_weighs_large_ones_again() -> None:
    """Many positions and few weights: keep. Few positions and many weights: norms by Gram, then one sum."""

    def keeps(channels: int, size: int) -> bool:
        x = torch.empty(32, channels, size, size)
        return clipping_keeps_grads(x, x, (channels, channels, 3, 3), ConvGeometry(3, padding=1))

    assert keeps(64, 32)
    assert not keeps(512, 4)


@pytest.mark.parametrize(("short", "times"), [(True, 100.0), (False, 5.5)])
def test_how_slow_emulation_is_depends_on_the_vectors(short, times, monkeypatch) -> None:
    monkeypatch.setattr(half, "short_vectors", lambda: short)
    assert half.emulated() == times


def test_half_precision_is_slow_where_a_cpu_has_no_instructions_for_it(monkeypatch) -> None:
    """But for what widens it first."""
    x, grad = torch.zeros(8, 128, 16, 16), torch.zeros(8, 128, 16, 16)
    arguments = (x.bfloat16(), grad.bfloat16(), (128, 128, 3, 3), ConvGeometry(3, padding=1), "sq_norms")
    plans = {}
    monkeypatch.setattr(planner, "emulated", lambda: 5.5)
    for emulated in (True, False):
        monkeypatch.setattr(planner, "is_emulated", lambda dtype, device, found=emulated: found)
        planner.choose.cache_clear()
        plans[emulated] = plan(*arguments)
        assert ("at 1/5.5 rate" in str(plans[emulated])) == emulated
    planner.choose.cache_clear()
    times = {name: plans[True].seconds[name] / plans[False].seconds[name] for name in plans[True].seconds}
    assert times["gram"] == times["unfold"] == 1
    assert min(times["grouped"], times["loop"]) > 3
