"""Memory budgets: kept by what is measured, refused with the smallest that would do."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from psgrad.conv import ConvGeometry, plan, weight_grad_sq_norms, weight_grads
from psgrad.conv.strategies import STRATEGIES
from psgrad.errors import ConfigError, StrategyError
from tests.conv import budget_peaks
from tests.problems import ConvProblem, conv_problems, serves

ARGUMENTS = (torch.randn(8, 4, 9, 9), torch.randn(8, 6, 9, 9), (6, 4, 3, 3), ConvGeometry(3, padding=1))
FUNCTIONS = {"grads": weight_grads, "sq_norms": weight_grad_sq_norms}


def smallest(*arguments, **keywords) -> tuple[int, str]:
    """The budget and the strategy that an error names."""
    with pytest.raises(ConfigError, match=r"smallest that would do is \d+, with strategy") as error:
        plan(*arguments, **keywords, memory_budget=1)
    words = str(error.value).split("smallest that would do is ")[1].split(", with strategy ")
    return int(words[0]), words[1].strip("'")


@pytest.mark.parametrize("verb", FUNCTIONS)
@settings(max_examples=60)
@given(problem=conv_problems(min_samples=2))
def test_the_smallest_budget_that_is_named_does_and_one_byte_less_does_not(
    verb: str, problem: ConvProblem
) -> None:
    keywords = {"rows_per_sample": problem.rows_per_sample}
    least, name = smallest(*problem.operands, verb, **keywords)
    compute = FUNCTIONS[verb]
    expected = compute(*problem.operands, "loop", **keywords)
    for strategy in ("auto", name):
        got = compute(*problem.operands, strategy, memory_budget=least, **keywords)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        assert got.is_contiguous()
        with pytest.raises(ConfigError, match=f"memory_budget={least - 1} bytes is too small"):
            compute(*problem.operands, strategy, memory_budget=least - 1, **keywords)


@pytest.mark.parametrize(
    ("verb", "name"), [case for case in product(FUNCTIONS, STRATEGIES) if serves(case[1], case[0], ARGUMENTS)]
)
def test_any_number_of_samples_at_a_time_gives_the_same(verb: str, name: str) -> None:
    compute = FUNCTIONS[verb]
    expected = compute(*ARGUMENTS)
    seen = set()
    for budget in (20_000 * 2**power for power in range(12)):
        try:
            got = compute(*ARGUMENTS, name, memory_budget=budget)
        except ConfigError:
            continue
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        seen.add(budget)
    assert len(seen) > 3


def test_a_plan_says_how_many_samples_go_at_a_time_and_who_takes_too_much() -> None:
    x = torch.empty(32, 64, 32, 32, device="meta")
    arguments = (x, x, (64, 64, 3, 3), ConvGeometry(3, padding=1), "sq_norms")
    found = plan(*arguments, memory_budget=12 * 2**20)
    assert found.at_once is not None
    assert 1 < found.at_once < 32
    assert f"{found.at_once} samples at a time within {12 * 2**20} bytes" in str(found)
    assert "over the budget" in found.refusals["gram"]
    assert "gram" not in found.seconds
    assert plan(*arguments, memory_budget=2**40).at_once == 32
    assert plan(*arguments, memory_budget=2**40).chosen == plan(*arguments).chosen


def test_a_named_strategy_over_the_budget_names_itself_and_the_smallest() -> None:
    x = torch.empty(4, 64, 64, 64, device="meta")
    arguments = (x, x, (64, 64, 3, 3), ConvGeometry(3, padding=1))
    with pytest.raises(ConfigError, match=r"'unfold', which takes \d+.*smallest that would do is \d+"):
        weight_grad_sq_norms(*arguments, "unfold", memory_budget=1_000_000)


@pytest.mark.parametrize("budget", [0, -5, 1.5, True, "1 GB"])
@pytest.mark.parametrize("compute", [*FUNCTIONS.values(), lambda *a, **k: plan(*a, "grads", **k)])
def test_what_is_no_budget_is_refused(compute, budget) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget=.*positive int, in bytes"):
        compute(*ARGUMENTS, memory_budget=budget)


def test_measuring_under_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="times whole batches"):
        weight_grads(*ARGUMENTS, "measure", memory_budget=10**9)


def test_strategies_that_refuse_or_do_not_exist_say_so_under_a_budget_too() -> None:
    with pytest.raises(StrategyError, match="gram"):
        weight_grads(*ARGUMENTS, "gram", memory_budget=10**9)
    with pytest.raises(StrategyError, match="no strategy 'fast'"):
        weight_grads(*ARGUMENTS, "fast", memory_budget=10**9)


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_an_empty_batch_needs_no_memory(verb: str) -> None:
    x, grad, *rest = ARGUMENTS
    assert len(FUNCTIONS[verb](x[:0], grad[:0], *rest, memory_budget=1)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux")
def test_what_is_measured_stays_within_the_budget() -> None:
    """In a process where every block beyond 64 KiB is the system's: what is freed is gone."""
    command = [sys.executable, "-m", budget_peaks.__name__]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # minutes, and not what is measured
    run = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    measured = [line.split(" | ") for line in run.stdout.splitlines()]
    assert {(verb, name) for _, verb, name, *_ in measured} >= {
        (verb, name)
        for verb in FUNCTIONS
        for name in STRATEGIES
        if name != "triton" and (verb, name) != ("grads", "gram")
    }
    over = [row for row in measured if int(row[4]) > int(row[3]) + budget_peaks.NOISE]
    assert not over
