"""The verbs themselves: the weighted sum, empty batches, what they refuse, what they return."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psgrad.conv import ConvGeometry, plan, weight_grad_sq_norms, weight_grads, weighted_weight_grad
from psgrad.conv.strategies import STRATEGIES
from psgrad.errors import ShapeError, StrategyError
from tests.problems import ConvProblem, conv_problems, serves


def weighted(x, grad_output, weight_shape, geometry, **keywords):
    factors = torch.ones(len(x) // max(1, int(keywords.get("rows_per_sample", 1))))
    return weighted_weight_grad(x, grad_output, weight_shape, geometry, factors, **keywords)


def planned(x, grad_output, weight_shape, geometry):
    return plan(x, grad_output, weight_shape, geometry, "grads")


VERBS = (weight_grads, weight_grad_sq_norms, weighted)


@given(problem=conv_problems(), data=st.data())
def test_weighted_sum_is_that_of_the_oracle(problem: ConvProblem, data: st.DataObject) -> None:
    values = st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.25]), min_size=problem.samples)
    factors = torch.tensor(data.draw(values)[: problem.samples], dtype=torch.float64)
    result = weighted_weight_grad(*problem.operands, factors, rows_per_sample=problem.rows_per_sample)
    assert result.shape == problem.weight_shape
    assert result.dtype == torch.float64
    expected = torch.einsum("n,n...->...", factors, problem.oracle())
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "grad_output", "both"])
@given(problem=conv_problems(min_samples=2, layouts=("contiguous", "channels_last", "sliced")))
def test_a_zero_factor_removes_a_sample_that_is_not_finite(
    poison: float, where: str, problem: ConvProblem
) -> None:
    x, grad, shape, geometry = problem.operands
    expected = problem.oracle()[:1].sum(0) * 0.5
    k = problem.rows_per_sample
    if where != "grad_output":
        x[k : 2 * k] = poison
    if where != "x":
        grad[k : 2 * k] = poison
    factors = torch.zeros(problem.samples)
    factors[0] = 0.5
    result = weighted_weight_grad(x, grad, shape, geometry, factors, rows_per_sample=k)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
    factors[1] = 1.0
    spoiled = weighted_weight_grad(x, grad, shape, geometry, factors, rows_per_sample=k)
    # every window of the other samples is finite, so what is not comes from sample 1
    assert not spoiled.isfinite().all() or bool((expected == 0).all())


@pytest.mark.parametrize("name", ["auto", *STRATEGIES])
def test_an_empty_batch_gives_empty_results(name: str) -> None:
    x, grad = torch.zeros(0, 2, 5, 5), torch.zeros(0, 4, 3, 3)
    arguments = (x, grad, (4, 2, 3, 3), ConvGeometry(3))
    if serves(name, "grads", arguments):
        assert weight_grads(*arguments, name).shape == (0, 4, 2, 3, 3)
    if serves(name, "sq_norms", arguments):
        assert weight_grad_sq_norms(*arguments, name).shape == (0,)
    total = weighted_weight_grad(*arguments, torch.zeros(0))
    assert torch.equal(total, torch.zeros(4, 2, 3, 3))


@pytest.mark.parametrize("name", ["auto", *STRATEGIES])
@pytest.mark.parametrize(("shape", "transposed"), [((0, 3, 3), False), ((4, 0, 3), False), ((0, 4, 3), True)])
def test_a_layer_without_channels_gives_empty_results(name: str, shape: tuple, transposed: bool) -> None:
    geometry = ConvGeometry(3, transposed=transposed, groups=2)
    ends = (shape[0], 2 * shape[1]) if transposed else (2 * shape[1], shape[0])
    x, grad = torch.ones(4, ends[0], 5), torch.ones(4, ends[1], 7 if transposed else 3)
    if serves(name, "grads", (x, grad, shape, geometry)):
        assert weight_grads(x, grad, shape, geometry, name, rows_per_sample=2).shape == (2, *shape)
    if serves(name, "sq_norms", (x, grad, shape, geometry)):
        norms = weight_grad_sq_norms(x, grad, shape, geometry, name, rows_per_sample=2)
        assert torch.equal(norms, torch.zeros(2))
    assert weighted_weight_grad(x, grad, shape, geometry, torch.ones(4)).shape == shape


def test_grouped_refuses_an_empty_batch() -> None:
    arguments = (torch.zeros(0, 2, 5), torch.zeros(0, 4, 3), (4, 2, 3), ConvGeometry(3))
    with pytest.raises(StrategyError, match=r"grouped.*\(4, 2, 3\).*empty batch"):
        weight_grads(*arguments, "grouped")


@pytest.mark.parametrize("name", ["auto", *STRATEGIES])
def test_results_are_detached_and_operands_untouched(name: str) -> None:
    x = torch.randn(3, 2, 5, requires_grad=True)
    grad = torch.randn(3, 4, 3, requires_grad=True)
    before = x.detach().clone(), grad.detach().clone()
    arguments = (x, grad, (4, 2, 3), ConvGeometry(3))
    results = [weighted_weight_grad(*arguments, torch.tensor([1.0, 0.0, 2.0]))]
    if serves(name, "grads", arguments):
        results.append(weight_grads(*arguments, name))
    if serves(name, "sq_norms", arguments):
        results.append(weight_grad_sq_norms(*arguments, name))
    for result in results:
        assert result.grad_fn is None
        assert not result.requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(grad, before[1])


def test_results_of_the_right_dtype() -> None:
    arguments = (
        torch.randn(3, 2, 5, dtype=torch.bfloat16),
        torch.randn(3, 4, 3, dtype=torch.bfloat16),
        (4, 2, 3),
        ConvGeometry(3),
    )
    assert weight_grads(*arguments).dtype == torch.bfloat16
    assert weight_grad_sq_norms(*arguments).dtype == torch.float32
    assert weighted_weight_grad(*arguments, torch.ones(3, dtype=torch.float64)).dtype == torch.bfloat16


BAD = {
    "rows differ": ((3, 2, 5), (2, 4, 3), (4, 2, 3), r"\(3, 2, 5\).*\(2, 4, 3\)"),
    "input channels": ((3, 3, 5), (3, 4, 3), (4, 2, 3), r"\(3, 3, 5\).*weight \(4, 2, 3\)"),
    "output channels": ((3, 2, 5), (3, 5, 3), (4, 2, 3), r"\(3, 5, 3\).*\[3, 4, 3\]"),
    "output size": ((3, 2, 5), (3, 4, 4), (4, 2, 3), r"\(3, 4, 4\).*\[3, 4, 3\]"),
    "rank of x": ((3, 2, 5, 5), (3, 4, 3), (4, 2, 3), r"\(3, 2, 5, 5\)"),
    "no spatial axis": ((3, 2), (3, 4), (4, 2), r"\(3, 2\).*\(4, 2\)"),
    "four spatial axes": ((3, 2, 5, 5, 5, 5), (3, 4, 3, 3, 3, 3), (4, 2, 3, 3, 3, 3), "1 to 3"),
    "input too small": ((3, 2, 2), (3, 4, 1), (4, 2, 3), r"\(2,\)"),
    "another kernel": ((3, 2, 5), (3, 4, 1), (4, 2, 5), r"\(3,\).*\(5,\)"),
}


@pytest.mark.parametrize("verb", [*VERBS, planned])
@pytest.mark.parametrize("case", BAD)
def test_shapes_that_do_not_fit_raise_and_are_named(verb: Callable, case: str) -> None:
    x, grad, weight_shape, words = BAD[case]
    with pytest.raises(ShapeError, match=words):
        verb(torch.zeros(x), torch.zeros(grad), weight_shape, ConvGeometry(3))


@pytest.mark.parametrize("verb", [*VERBS, planned])
def test_groups_that_do_not_divide_raise(verb: Callable) -> None:
    with pytest.raises(ShapeError, match="groups=2"):
        verb(torch.zeros(3, 4, 5), torch.zeros(3, 3, 3), (3, 2, 3), ConvGeometry(3, groups=2))
    transposed = ConvGeometry(3, groups=2, transposed=True)
    with pytest.raises(ShapeError, match="groups=2"):
        verb(torch.zeros(3, 3, 5), torch.zeros(3, 4, 7), (3, 2, 3), transposed)


@pytest.mark.parametrize("verb", VERBS)
def test_rows_and_dtypes_that_do_not_fit_raise(verb: Callable) -> None:
    x, grad, rest = torch.zeros(3, 2, 5), torch.zeros(3, 4, 3), ((4, 2, 3), ConvGeometry(3))
    for rows_per_sample in (2, 0, -1):
        with pytest.raises(ShapeError, match=f"3 rows.*rows_per_sample={rows_per_sample}"):
            verb(x, grad, *rest, rows_per_sample=rows_per_sample)
    with pytest.raises(ShapeError, match=r"float32.*float64"):
        verb(x, grad.double(), *rest)


@pytest.mark.parametrize("verb", VERBS)
def test_a_number_or_a_tensor_of_another_kind_is_named(verb: Callable) -> None:
    x, grad, shape, geometry = torch.ones(4, 2, 5), torch.ones(4, 3, 3), (3, 2, 3), ConvGeometry(3)
    verb(x, grad, shape, geometry, rows_per_sample=2)  # known by then to the cache, where 2 == 2.0
    with pytest.raises(ShapeError, match=r"rows_per_sample must be an int, got 2\.0"):
        verb(x, grad, shape, geometry, rows_per_sample=2.0)
    with pytest.raises(ShapeError, match=r"a tensor \(3, 2, 3\): give weight\.shape"):
        verb(x, grad, torch.ones(shape), geometry)
    with pytest.raises(StrategyError, match=r"no strategy computes in torch\.float8_e4m3fn"):
        verb(x.to(torch.float8_e4m3fn), grad.to(torch.float8_e4m3fn), shape, geometry)


def test_factors_that_do_not_fit_raise() -> None:
    x, grad, rest = torch.zeros(4, 2, 5), torch.zeros(4, 4, 3), ((4, 2, 3), ConvGeometry(3))
    for factors in (torch.ones(3), torch.ones(4, 1), torch.ones(())):
        with pytest.raises(ShapeError, match=r"factors.*4 samples"):
            weighted_weight_grad(x, grad, *rest, factors)
    with pytest.raises(ShapeError, match=r"factors \(4,\) for 2 samples"):
        weighted_weight_grad(x, grad, *rest, torch.ones(4), rows_per_sample=2)


@pytest.mark.parametrize("verb", [weight_grads, weight_grad_sq_norms])
def test_an_unknown_strategy_raises_and_names_those_there_are(verb: Callable) -> None:
    arguments = (torch.zeros(3, 2, 5), torch.zeros(3, 4, 3), (4, 2, 3), ConvGeometry(3))
    with pytest.raises(StrategyError, match=r"'fastest'.*auto, measure, " + ", ".join(STRATEGIES)):
        verb(*arguments, "fastest")
