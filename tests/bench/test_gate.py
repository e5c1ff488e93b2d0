"""The gate lets the right ones through and nobody else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from psgrad.bench.cases import CASE_SETS, ConvCase
from psgrad.bench.gate import check, reference
from psgrad.bench.peers import SUITES, ordinary_gradient, torch_func
from psgrad.bench.sweep import measure_case
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES
from tests import oracle

CASE = ConvCase("test", 4, 6, (7, 7), 3, stride=2, padding=1, dilation=1, groups=2)
CASES = [CASE, *CASE_SETS["tiny"], replace(CASE, name="3-D", input_size=(4, 5, 4))]


def expected(case: ConvCase, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return oracle.weight_grads(
        x,
        grad,
        case.weight_shape,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_the_oracle(case: ConvCase) -> None:
    x, grad = case.operands(3)
    assert torch.equal(torch.stack(list(reference(case, x, grad))), expected(case, x, grad))


@pytest.mark.parametrize("name", SUITES["strategies"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contenders_are_right(case: ConvCase, name: str) -> None:
    verdict = check(SUITES["strategies"][name](case), case, *case.operands(3))
    assert verdict.reason is None
    assert verdict.error < 1e-5


@pytest.mark.parametrize("name", SUITES["norms"])
def test_the_contenders_for_norms_are_right_and_a_wrong_one_is_not(name: str) -> None:
    contender = SUITES["norms"][name](CASE)
    assert check(contender, CASE, *CASE.operands(3), "sq_norms").reason is None
    wrong = check(lambda x, grad: 1.1 * contender(x, grad), CASE, *CASE.operands(3), "sq_norms")
    assert wrong.reason == "wrong by 10.0%"


def test_every_strategy_that_gives_gradients_is_a_contender() -> None:
    problem = normalise(*CASE.operands(2), CASE.weight_shape, CASE.geometry)[2]
    served = {name for name, strategy in STRATEGIES.items() if not strategy.refusal(problem, "grads")}
    if not torch.cuda.is_available():
        served -= {"triton"}
    assert served <= set(SUITES["strategies"])


def test_torch_func_is_vmap_of_grad() -> None:
    x, grad = CASE.operands(3, dtype=torch.float64)

    def loss(weight, x, grad):
        return (oracle.convolve(x[None], weight, stride=2, padding=1, groups=2) * grad[None]).sum()

    weight = torch.zeros(CASE.weight_shape, dtype=torch.float64)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, grad)
    torch.testing.assert_close(torch_func(CASE)(x, grad), grads)


def test_the_floor_is_the_sum_over_the_batch() -> None:
    x, grad = CASE.operands(3, dtype=torch.float64)
    torch.testing.assert_close(ordinary_gradient(CASE)(x, grad), expected(CASE, x, grad).sum(0))


def one_entry_off(case):
    def contender(x, grad):
        out = expected(case, x, grad)
        out[1, 0, 0, 0, 0] += 1e-2 * out[1].norm()
        return out.to(x.dtype)

    return contender


def not_finite(case):
    return lambda x, grad: expected(case, x, grad).index_fill(0, torch.tensor([2]), float("nan"))


def transposed_shape(case):
    return lambda x, grad: expected(case, x, grad).transpose(0, 1)


def raising(case):
    def contender(x, grad):
        raise NotImplementedError("no groups here")

    return contender


WRONG = {
    "one entry off": (one_entry_off, "wrong by 1.0%"),
    "not finite": (not_finite, "not finite"),
    "shape": (transposed_shape, r"shape \(6, 3, 2, 3, 3\) instead of \(3, 6, 2, 3, 3\)"),
    "raising": (raising, "NotImplementedError: no groups here"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_contender_gets_no_number_only_its_error(kind: str) -> None:
    maker, words = WRONG[kind]
    right = SUITES["strategies"]["loop"]
    results = measure_case(CASE, 3, {"right": right, "wrong": maker, "also right": right}, rounds=2)
    assert [r.contender for r in results] == ["right", "wrong", "also right"]
    assert re.fullmatch(words, results[1].reason)
    assert results[1].measurement is None
    for result in (results[0], results[2]):
        assert result.reason is None
        assert len(result.measurement.ratios) == 2


def test_a_peer_that_is_wrong_on_a_layout_is_found() -> None:
    """Opacus unfolds a strided convolution's input as if it were contiguous."""
    case = ConvCase("patches", 4, 6, (8, 8), 2, stride=2, channels_last=True)
    (result,) = measure_case(case, 3, {"opacus": SUITES["strategies"]["opacus"]}, rounds=1)
    assert result.measurement is None
    assert result.error > 0.1


def test_all_wrong_is_still_a_result() -> None:
    (result,) = measure_case(CASE, 3, {"wrong": raising}, rounds=2)
    assert result.measurement is None


def test_asked_to_stop_before_the_first_round_gives_nothing() -> None:
    assert measure_case(CASE, 3, SUITES["strategies"], rounds=2, stop=lambda: True) == []
