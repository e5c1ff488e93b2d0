"""Every strategy in the precisions below float64: within the bound of the roundings that each may make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psgrad.conv import ordinary, products, weight_grad_sq_norms, weight_grads, weighted_weight_grad
from psgrad.conv.problem import normalise
from psgrad.conv.processor import Processor
from psgrad.conv.strategies import STRATEGIES, unfold
from tests.conv.test_strategies import NAMES, served, set_budget, sq_norms_of
from tests.machines import AMD, AMD_HALVES, on
from tests.problems import ConvProblem, conv_problems


def check_rounding(name: str, problem: ConvProblem, roundings: int) -> None:
    """Every entry within `roundings` unit roundoffs of the sum of the absolute products.

    That is the textbook bound of a sum in which each term meets so many roundings.
    """
    dtype = problem.x.dtype
    magnitudes = problem.oracle_of_magnitudes()
    unit = torch.finfo(dtype).eps / 2
    if served(name, "grads", problem):
        grads = weight_grads(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
        assert grads.dtype == dtype
        assert ((grads.double() - problem.oracle()).abs() <= roundings * unit * magnitudes).all()
    if served(name, "sq_norms", problem):
        norms = weight_grad_sq_norms(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
        assert norms.dtype == torch.float32
        # | |a|^2 - |b|^2 | <= |a - b| (|a| + |b|), with the bound above for a - b, and room for
        # a thousand float32 roundings of the norm itself
        spread = sq_norms_of(magnitudes).sqrt()
        bound = roundings * unit * spread * (2 + roundings * unit) * spread
        bound += 1000 * torch.finfo(torch.float32).eps * spread.square()
        assert ((norms.double() - sq_norms_of(problem.oracle())).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(problem=conv_problems(dtype=torch.float32))
def test_float32_keeps_to_the_rounding_bound(name: str, problem: ConvProblem) -> None:
    check_rounding(name, problem, roundings=terms_of(problem) + 4)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(problem=conv_problems(dtype=torch.bfloat16))
def test_bfloat16_rounds_once_per_row(name: str, problem: ConvProblem) -> None:
    """Sums within a row are kept in float32; backends add the rows of a sample in bfloat16, and the
    result is rounded once. Two more for the float32 sums and for products that are split."""
    check_rounding(name, problem, roundings=problem.rows_per_sample + 3)


@pytest.mark.parametrize("widens", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=60)
@given(data=st.data())
def test_unfold_in_half_precision_with_and_without_instructions_for_it(dtype, widens, data) -> None:
    problem = data.draw(conv_problems(dtype=dtype))
    x, grad, normal = normalise(*problem.operands, problem.rows_per_sample)
    strategy, expected, magnitudes = STRATEGIES["unfold"], problem.oracle(), problem.oracle_of_magnitudes()
    unit = torch.finfo(dtype).eps / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfold, "_widened", lambda p: replace(p, dtype=torch.float32) if widens else p)
        if data.draw(st.booleans()):
            set_budget(patch, 1)
        for grads in (strategy.grads(x, grad, normal), strategy.kept(x, grad, normal)):
            assert grads.dtype == dtype
            roundings = 2 if widens else problem.rows_per_sample + 3
            error = (grads.double() - expected).abs()
            assert (error <= roundings * unit * magnitudes + torch.finfo(dtype).tiny).all()
        norms = strategy.sq_norms(x, grad, normal)
        if normal.samples:
            total = strategy.weighted_sum(x, grad, normal, torch.ones(normal.samples))
            roundings = (2 if widens else problem.rows_per_sample + 3) + normal.samples
            error = (total.double() - expected.sum(0)).abs()
            assert (error <= roundings * unit * magnitudes.sum(0) + torch.finfo(dtype).tiny).all()
    assert norms.dtype == torch.float32
    bound = 2 * (problem.rows_per_sample + 3) * unit * sq_norms_of(magnitudes)
    assert ((norms.double() - sq_norms_of(expected)).abs() <= bound + 1e-6).all()


def terms_of(problem: ConvProblem) -> int:
    """At most so many products are added up for an entry of a gradient."""
    return problem.rows_per_sample * max(problem.x[:1].numel(), problem.grad_output[:1].numel())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
@pytest.mark.parametrize("name", [*NAMES, "unfold window", "unfold row"])
@pytest.mark.parametrize("cpu", [AMD, AMD_HALVES], ids=["whole vectors", "halves"])
@settings(max_examples=60)
@given(problem=conv_problems(dtype=torch.float32))
def test_float32_by_onednn_keeps_to_the_rounding_bound(
    name: str, cpu: Processor, problem: ConvProblem
) -> None:
    """As on a CPU whose MKL is slow, with no product too small."""
    name, _, order = name.partition(" ")
    with pytest.MonkeyPatch.context() as patch, on(cpu):
        for constant in ("LARGE", "LEAST_INNER"):
            patch.setattr(products, constant, 1)
        for constant in ("LEAST_ALONE", "MANY_POSITIONS"):
            patch.setattr(ordinary, constant, 1)
        patch.setattr(unfold, "CALLS", 1)
        if order:
            by_row = order == "row" and problem.rows_per_sample == 1
            patch.setattr(unfold, "windows_are_faster", lambda problem: True)
            patch.setattr(unfold, "rows_are_faster", lambda problem: by_row)
        check_rounding(name, problem, roundings=terms_of(problem) + 4)
        factors = torch.rand(problem.samples)
        total = weighted_weight_grad(*problem.operands, factors, rows_per_sample=problem.rows_per_sample)
    expected = torch.einsum("n,n...->...", factors.double(), problem.oracle())
    roundings = problem.samples * (terms_of(problem) + 4) + 4
    bound = roundings * torch.finfo(torch.float32).eps * problem.oracle_of_magnitudes().sum(0)
    assert ((total.double() - expected).abs() <= bound).all()
