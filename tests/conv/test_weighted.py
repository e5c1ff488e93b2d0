"""The weighted sum: pieces of a batch, budgets, and a plan that says what is done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psgrad.conv import ConvGeometry, clipping_keeps_grads, plan, weighted, weighted_weight_grad
from psgrad.errors import ConfigError, StrategyError
from tests.problems import ConvProblem, conv_problems

# channels, size, kernel, stride, padding, groups, what is chosen
LAYERS = {
    "3x3": (64, 64, (16, 16), 3, 1, 1, 1, "backend"),
    "1x1": (64, 64, (16, 16), 1, 1, 0, 1, "product"),
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
    found = plan(*operands, "weighted_sum")
    assert found.chosen == LAYERS[layer][-1]
    assert set(found.costs) | set(found.refusals) == {"backend", "product", "correlate"}
    lines = str(found).splitlines()
    assert lines[0].startswith("weighted_sum of a convolution: N=8")
    assert lines[1].startswith(f"-> {found.chosen}")
    assert "GFLOP" in lines[1]
    keep, again = lines[-2:]
    keeps = clipping_keeps_grads(*operands)
    assert found.clipping is not None
    assert found.clipping.keeps == keeps
    assert keep.startswith("->" if keeps else "  ")
    assert again.startswith("  " if keeps else "->")
    assert f"made by {found.clipping.grads}" in keep
    assert f"norms by {found.clipping.norms}" in again


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


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_batch_is_summed_in_pieces(layer: str, dtype: torch.dtype, monkeypatch) -> None:
    x, grad, shape, geometry = arguments(layer, samples=11)
    x, grad, factors = x.to(dtype), grad.to(dtype), torch.linspace(0, 1, 11)
    whole = weighted_weight_grad(x.double(), grad.double(), shape, geometry, factors.to(dtype).double())
    one = x[0].nbytes + grad[0].nbytes
    monkeypatch.setattr(weighted, "WHOLE_BYTES", 4 * one)
    monkeypatch.setattr(weighted, "PIECE_BYTES", 3 * one)
    weighted.plan_sum.cache_clear()
    found = plan(x, grad, shape, geometry, "weighted_sum")
    assert found.at_once == 3
    assert "3 samples at a time" in str(found)
    seen = []
    real = weighted._piece
    monkeypatch.setattr(weighted, "_piece", lambda x, *rest: seen.append(len(x)) or real(x, *rest))
    got = weighted_weight_grad(x, grad, shape, geometry, factors)
    weighted.plan_sum.cache_clear()
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


def test_an_empty_batch_has_a_plan() -> None:
    assert str(plan(*arguments("3x3", samples=0), "weighted_sum"))
