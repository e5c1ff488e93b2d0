"""The weighted sum: pieces of a batch, budgets, and a plan that says what is done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psgrad.conv import (
    ConvGeometry,
    clipping_keeps_grads,
    plan,
    planner,
    sum_planner,
    weight_grads,
    weighted,
    weighted_weight_grad,
)
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES
from psgrad.conv.sum_planner import ONCE, plan_sum
from psgrad.errors import ConfigError, StrategyError
from tests.conv.test_strategies import set_budget
from tests.machines import INTEL, on
from tests.problems import ConvProblem, conv_problems

# channels, size, kernel, stride, padding, groups, what is chosen
LAYERS = {
    "3x3": (64, 64, (16, 16), 3, 1, 1, 1, "backend"),
    "1x1": (256, 256, (4, 4), 1, 1, 0, 1, "product"),
    "first": (3, 64, (32, 32), 3, 1, 1, 1, "unfold"),
    "depthwise": (96, 96, (28, 28), 7, 1, 3, 96, "correlate"),
}


def arguments(layer: str, samples: int = 8):
    inputs, outputs, size, kernel, stride, padding, groups, _ = LAYERS[layer]
    geometry = ConvGeometry((kernel, kernel), stride, padding, groups=groups)
    x = torch.randn(samples, inputs, *size)
    grad = torch.randn(samples, outputs, *size)
    return x, grad, (outputs, inputs // groups, kernel, kernel), geometry


@pytest.mark.parametrize("layer", LAYERS)
def test_a_plan_says_how_and_what_clipping_does(layer: str) -> None:
    operands = arguments(layer)
    with on(INTEL):
        found, keeps = plan(*operands, "weighted_sum"), clipping_keeps_grads(*operands)
    assert found.chosen == LAYERS[layer][-1]
    assert set(found.costs) | set(found.refusals) == {*ONCE, *STRATEGIES}
    lines = str(found).splitlines()
    assert lines[0].startswith("weighted_sum of a convolution: N=8")
    assert lines[1].startswith(f"-> {found.chosen}")
    assert "GFLOP" in lines[1]
    keep, again = lines[-2:]
    assert found.clipping is not None
    assert found.clipping.keeps == keeps
    assert keep.startswith("->" if keeps else "  ")
    assert again.startswith("  " if keeps else "->")
    assert f"made by {found.clipping.grads}" in keep
    assert f"norms by {found.clipping.norms}" in again


@settings(max_examples=200)
@given(problem=conv_problems(min_samples=1), data=st.data())
def test_every_way_is_that_of_the_oracle(problem: ConvProblem, data: st.DataObject) -> None:
    values = st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=problem.samples, max_size=problem.samples)
    factors = torch.tensor(data.draw(values), dtype=torch.float64)
    expected = torch.einsum("n,n...->...", factors, problem.oracle())
    x, grad, normal = normalise(*problem.operands, problem.rows_per_sample)
    removed = (factors == 0).repeat_interleave(problem.rows_per_sample)
    if removed.any():
        x, grad = x.clone(), grad.clone()  # one may be expanded
        x[removed], grad[removed] = torch.nan, torch.inf
    ways = plan_sum(normal).seconds
    assert {*ways} & {*ONCE}
    assert {*ways} >= {"loop", "grouped", "unfold"}
    for how in ways:
        got = weighted._piece(x, grad, normal, factors, how)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=150)
@given(problem=conv_problems(min_samples=2), data=st.data())
def test_the_smallest_budget_that_is_named_does_and_one_byte_less_does_not(
    problem: ConvProblem, data: st.DataObject
) -> None:
    values = st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=problem.samples, max_size=problem.samples)
    factors = torch.tensor(data.draw(values), dtype=torch.float64)
    keywords = {"rows_per_sample": problem.rows_per_sample}
    with pytest.raises(ConfigError, match="smallest that would do is") as error:
        weighted_weight_grad(*problem.operands, factors, **keywords, memory_budget=1)
    least = int(str(error.value).split("would do is ")[1].split(",")[0])
    got = weighted_weight_grad(*problem.operands, factors, **keywords, memory_budget=least)
    expected = torch.einsum("n,n...->...", factors, problem.oracle())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ConfigError, match=f"memory_budget={least - 1}"):
        weighted_weight_grad(*problem.operands, factors, **keywords, memory_budget=least - 1)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if LAYERS[layer][-1] in ONCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_batch_is_summed_in_pieces(layer: str, dtype: torch.dtype, monkeypatch) -> None:
    x, grad, shape, geometry = arguments(layer, samples=11)
    x, grad, factors = x.to(dtype), grad.to(dtype), torch.linspace(0, 1, 11)
    whole = weighted_weight_grad(x.double(), grad.double(), shape, geometry, factors.to(dtype).double())
    one = x[0].nbytes + grad[0].nbytes
    monkeypatch.setattr(sum_planner, "WHOLE_BYTES", 4 * one)
    monkeypatch.setattr(sum_planner, "PIECE_BYTES", 3 * one)
    monkeypatch.setattr(planner, "is_emulated", lambda dtype, device: False)  # where one call is no way
    plan_sum.cache_clear()
    found = plan(x, grad, shape, geometry, "weighted_sum")
    assert found.at_once == 3
    assert "3 samples at a time" in str(found)
    seen = []
    real = weighted._piece
    monkeypatch.setattr(weighted, "_piece", lambda x, *rest: seen.append(len(x)) or real(x, *rest))
    got = weighted_weight_grad(x, grad, shape, geometry, factors)
    plan_sum.cache_clear()
    assert seen == [3, 3, 3, 2]
    assert got.dtype == dtype
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1.0}
    torch.testing.assert_close(got.double(), whole, **close)


def test_what_cannot_be_planned_raises() -> None:
    with pytest.raises(StrategyError, match="planned by rule"):
        plan(*arguments("3x3"), "weighted_sum", strategy="measure")
    for budget in (0, 2.5, True):
        with pytest.raises(ConfigError, match="positive int"):
            weighted_weight_grad(*arguments("3x3"), torch.ones(8), memory_budget=budget)


def test_gradients_are_added_up_in_chunks_and_in_wide_numbers() -> None:
    """2,000 gradients of ones in bfloat16: added up one after the other they would stay at 256."""
    x = torch.ones(2000, 64, 1, 1, dtype=torch.bfloat16)
    for how in ("grouped", "unfold"):
        *operands, normal = normalise(x, x, (64, 64, 1, 1), ConvGeometry(1))
        total = weighted._piece(*operands, normal, torch.ones(2000), how)
        assert len(list(STRATEGIES[how].kept_in_chunks(*operands, normal))) > 2
        torch.testing.assert_close(total.float(), torch.full((64, 64, 1, 1), 2000.0), rtol=0.01, atol=0)


def test_an_empty_batch_has_a_plan() -> None:
    assert str(plan(*arguments("3x3", samples=0), "weighted_sum"))


@pytest.mark.parametrize("removed", [[], [0], [5, 6], [31]])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("gram", "triton", "correlate")])
def test_removed_samples_among_many_chunks(
    name: str, removed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk with a removed sample is a copy, in another order of memory than the others."""
    torch.manual_seed(0)
    x, grad = torch.randn(32, 8, 16, 16), torch.randn(32, 32, 16, 16)
    factors = torch.rand(32)
    factors[removed] = 0
    operands = x, grad, (32, 8, 3, 3), ConvGeometry((3, 3), padding=1)
    expected = torch.einsum("n,n...->...", factors, weight_grads(*operands))
    x[removed] = torch.nan
    set_budget(monkeypatch, 2**17)
    *tensors, normal = normalise(*operands)
    assert len(list(STRATEGIES[name].kept_in_chunks(*tensors, normal))) > 1
    got = STRATEGIES[name].weighted_sum(*tensors, normal, factors)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weighted_weight_grad(*operands, factors), expected, rtol=1e-4, atol=1e-3)
