"""Norms and the plain sum from the same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from psgrad.conv import ConvGeometry, weight_grad_sq_norms_and_sum
from psgrad.conv.at_once import at_once
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES
from psgrad.errors import ShapeError
from tests.conv.test_strategies import close, set_budget, sq_norms_of
from tests.problems import ConvProblem, conv_problems


@pytest.mark.parametrize("budget", [None, 1])
@settings(max_examples=100)
@given(problem=conv_problems(min_samples=1))
def test_every_strategy_squares_and_adds_up(budget: int | None, problem: ConvProblem) -> None:
    x, grad, normal = normalise(*problem.operands, problem.rows_per_sample)
    expected = problem.oracle()
    with pytest.MonkeyPatch.context() as patch:
        if budget is not None:  # a chunk for every sample
            set_budget(patch, budget)
        for strategy in STRATEGIES.values():
            if strategy.refusal(normal, "kept") is None:
                norms, total = strategy.sq_norms_and_sum(x, grad, normal)
                close(norms, sq_norms_of(expected))
                close(total, expected.sum(0))
                assert total.is_contiguous()


@settings(max_examples=300)
@given(problem=conv_problems())
def test_at_once_or_apart_it_is_the_same(problem: ConvProblem) -> None:
    norms, total = weight_grad_sq_norms_and_sum(*problem.operands, rows_per_sample=problem.rows_per_sample)
    expected = problem.oracle()
    close(norms, sq_norms_of(expected))
    close(total, expected.sum(0))


def operands(inputs: int, outputs: int, size: int, dtype: torch.dtype = torch.float32):
    x, grad = torch.randn(32, inputs, size, size), torch.randn(32, outputs, size, size)
    return x.to(dtype), grad.to(dtype), (outputs, inputs, 3, 3), ConvGeometry((3, 3), padding=1)


def test_it_is_apart_where_norms_need_no_gradient() -> None:
    def chosen(*layer: int, dtype: torch.dtype = torch.float32) -> str | None:
        return at_once(normalise(*operands(*layer, dtype=dtype))[2])

    assert chosen(64, 64, 32) is not None
    assert chosen(256, 256, 8) is None  # by Gram matrices
    assert chosen(64, 64, 32, dtype=torch.bfloat16) is None  # each gradient would be rounded


def test_half_precision_adds_up_what_was_not_rounded() -> None:
    """Many samples whose gradients cancel: rounded one by one they would leave their roundings."""
    x, grad, *shape = operands(64, 64, 16, dtype=torch.bfloat16)
    x, grad = x[:16].repeat(2, 1, 1, 1), grad[:16].repeat(2, 1, 1, 1)
    grad[16:] *= -1
    _, total = weight_grad_sq_norms_and_sum(x, grad, *shape)
    assert total.dtype == torch.bfloat16
    assert total.abs().max() < 1e-2


def test_a_sample_that_is_not_finite_stays_one() -> None:
    x, grad, *shape = operands(16, 32, 12)
    x[3, 0, 5, 5] = float("nan")
    norms, total = weight_grad_sq_norms_and_sum(x, grad, *shape)
    assert norms.isfinite().tolist() == [n != 3 for n in range(32)]
    assert total[:, 0].isnan().all()
    assert total[:, 1:].isfinite().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    x, grad, *shape = operands(16, 32, 12)
    with pytest.raises(ShapeError, match=r"\(32, 16, 12, 12\)"):
        weight_grad_sq_norms_and_sum(x, grad[:, :5], *shape)
