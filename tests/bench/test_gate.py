"""The gate lets the right ones through and nobody else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from psgrad.bench.case_sets import CASE_SETS
from psgrad.bench.cases import ConvCase
from psgrad.bench.gate import check, reference
from psgrad.bench.peers import PEERS, SUITES, factors, ordinary_gradient, torch_func
from psgrad.bench.sweep import Setting, measure
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES
from tests import oracle

CASE = ConvCase("test", 4, 6, (7, 7), 3, stride=2, padding=1, dilation=1, groups=2)
CASES = [
    CASE,
    *CASE_SETS["tiny"],
    replace(CASE, name="3-D", input_size=(4, 5, 4)),
    replace(CASE, name="3-D, no cubes", input_size=(4, 5, 4), kernel_size=(1, 3, 2), padding=(0, 1, 1)),
    replace(CASE, name="transposed, groups", transposed=True),
]
CPU = {verb: [name for name in suite if name != "triton"] for verb, suite in SUITES.items()}


def expected(case: ConvCase, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return oracle.weight_grads(
        x,
        grad,
        case.weight_shape,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        transposed=case.transposed,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_the_oracle(case: ConvCase) -> None:
    x, grad = case.operands(3)
    assert torch.equal(torch.stack(list(reference(case, x, grad))), expected(case, x, grad))


def cells(case: ConvCase, suite: dict, *, verb: str = "grads", n: int = 3, rounds: int = 2, **options):
    options = {"seconds": 60.0, "memory_limit": 2**30} | options
    setting = Setting("net", case, n, "float32")
    return list(measure(setting, [verb], rounds=rounds, suites={verb: suite}, **options))


@pytest.mark.parametrize("name", CPU["grads"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contenders_are_right(case: ConvCase, name: str) -> None:
    if name == "ExpandedWeights" and case.transposed:
        with pytest.raises(NotImplementedError, match="no transposed convolutions"):
            SUITES["grads"][name](case)
        return
    verdict = check(SUITES["grads"][name](case), case, *case.operands(3))
    if name == "correlate" and not case.groups == case.in_channels > 1:
        assert verdict.reason.startswith("StrategyError: strategy 'correlate' refuses")
        return
    assert verdict.reason is None
    assert verdict.error < 1e-5


@pytest.mark.parametrize("verb", ["sq_norms", "weighted_sum"])
@pytest.mark.parametrize("name", CPU["sq_norms"])
def test_the_contenders_for_norms_and_sums_are_right_and_a_wrong_one_is_not(name: str, verb: str) -> None:
    if name not in SUITES[verb]:
        return
    case = (
        replace(CASE, groups=CASE.in_channels, out_channels=CASE.in_channels) if name == "correlate" else CASE
    )
    contender = SUITES[verb][name](case)
    assert check(contender, case, *case.operands(3), verb).reason is None
    wrong = check(lambda x, grad: 1.1 * contender(x, grad), case, *case.operands(3), verb)
    assert wrong.reason == "wrong by 10.0%"


def test_the_weighted_sum_has_unequal_factors() -> None:
    assert len(set(factors(torch.zeros(5)).tolist())) == 5


@pytest.mark.parametrize("verb", ["grads", "sq_norms"])
def test_every_strategy_that_serves_a_verb_is_a_contender(verb: str) -> None:
    problem = normalise(*CASE.operands(2), CASE.weight_shape, CASE.geometry)[2]
    served = {name for name, strategy in STRATEGIES.items() if not strategy.refusal(problem, verb)}
    assert served <= set(SUITES[verb])
    assert set(PEERS) <= set(SUITES[verb])


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
    right = SUITES["grads"]["loop"]
    (cell,) = cells(CASE, {"right": right, "wrong": maker, "also right": right})
    assert list(cell.verdicts) == ["right", "wrong", "also right"]
    assert re.fullmatch(words, cell.verdicts["wrong"].reason)
    assert set(cell.measurements) == {"right", "also right"}
    assert all(len(measurement.ratios) == 2 for measurement in cell.measurements.values())


def test_a_peer_that_is_wrong_on_a_layout_is_found() -> None:
    """Opacus unfolds a strided convolution's input as if it were contiguous."""
    case = ConvCase("patches", 4, 6, (8, 8), 2, stride=2, channels_last=True)
    (cell,) = cells(case, {"opacus": SUITES["grads"]["opacus"]})
    assert cell.measurements == {}
    assert cell.verdicts["opacus"].error > 0.1


def test_a_peer_that_takes_too_much_memory_is_not_run_and_says_so() -> None:
    def must_not_run(case):
        raise AssertionError

    case = ConvCase("depthwise", 64, 64, (8, 8), 3, padding=1, groups=64)
    (cell,) = cells(case, {"opacus": must_not_run, "loop": SUITES["grads"]["loop"]}, memory_limit=2**16)
    assert re.fullmatch(r"not run: \d+\.\d GiB of temporaries", cell.verdicts["opacus"].reason)
    assert set(cell.measurements) == {"loop"}


def test_asked_to_stop_before_the_first_round_gives_nothing() -> None:
    assert cells(CASE, SUITES["grads"], stop=lambda: True) == []
