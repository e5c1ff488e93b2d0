"""Every strategy by name, both verbs, against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psgrad.conv import ConvGeometry, chunking, kept_weight_grads, scratch, weight_grad_sq_norms, weight_grads
from psgrad.conv import problem as problem_module
from psgrad.conv.numerics import squared_norms, weighted
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES, unfold
from psgrad.errors import StrategyError
from tests import oracle
from tests.machines import AMD, AMD_HALVES, INTEL, on
from tests.problems import LAYOUTS, ConvProblem, conv_problems, lay_out, serves

NAMES = ("auto", *STRATEGIES)


def served(name: str, verb: str, problem: ConvProblem) -> bool:
    """Whether the strategy takes the problem; if not, naming it must raise."""
    if serves(name, verb, problem.operands, problem.rows_per_sample):
        return True
    function = weight_grads if verb == "grads" else weight_grad_sq_norms
    with pytest.raises(StrategyError, match=name):
        function(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
    return False


def set_budget(patch: pytest.MonkeyPatch, budget: int) -> None:
    """Give every strategy this many bytes for the temporaries of a chunk of samples."""
    patch.setitem(chunking.CHUNK_BYTES, "cpu", budget)
    patch.setattr(scratch, "LARGEST", 0)  # what earlier problems left would be seen as larger


def close(actual: Tensor, expected: Tensor) -> None:
    """Float64 sums of at most a few thousand products of order one."""
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def sq_norms_of(grads: Tensor) -> Tensor:
    return grads.flatten(1).square().sum(1) if len(grads) else grads.new_zeros(0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300)
@given(problem=conv_problems())
def test_grads_are_those_of_the_loop(name: str, problem: ConvProblem) -> None:
    if not served(name, "grads", problem):
        return
    grads = weight_grads(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
    assert grads.shape == (problem.samples, *problem.weight_shape)
    assert grads.is_contiguous()
    close(grads, problem.oracle())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200)
@given(problem=conv_problems())
def test_sq_norms_are_those_of_the_loop(name: str, problem: ConvProblem) -> None:
    if not served(name, "sq_norms", problem):
        return
    norms = weight_grad_sq_norms(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
    assert norms.shape == (problem.samples,)
    close(norms, sq_norms_of(problem.oracle()))


@pytest.mark.parametrize("order", ["position", "window", "row"])
@settings(max_examples=300)
@given(problem=conv_problems(), one_at_a_time=st.booleans())
def test_unfolded_in_any_order_it_is_the_same(order: str, problem: ConvProblem, one_at_a_time: bool) -> None:
    x, grad, normal = normalise(*problem.operands, problem.rows_per_sample)
    factors = torch.rand(normal.samples, dtype=torch.float64)
    strategy = STRATEGIES["unfold"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfold, "order_for", unfold.order_for.__wrapped__)
        patch.setattr(unfold, "windows_are_faster", lambda problem: order != "position")
        by_row = order == "row" and normal.rows_per_sample == 1
        patch.setattr(unfold, "rows_are_faster", lambda problem: by_row)
        if one_at_a_time:
            set_budget(patch, 1)
        kept = strategy.kept(x, grad, normal)
        grads = strategy.grads(x, grad, normal)
        norms = strategy.sq_norms(x, grad, normal)
        total = strategy.weighted_sum(x, grad, normal, factors) if normal.samples else None
    close(kept, problem.oracle())
    assert grads.is_contiguous()
    close(grads, problem.oracle())
    close(norms, sq_norms_of(problem.oracle()))
    close(squared_norms(kept), norms)
    weighted_sum = torch.einsum("n,n...->...", factors, problem.oracle())
    close(weighted(factors, kept), weighted_sum)
    if total is not None:
        close(total, weighted_sum)


def test_rows_are_unfolded_apart_where_that_is_faster() -> None:
    geometry = ConvGeometry(3, padding=1)
    x, grad, problem = normalise(
        torch.randn(8, 64, 16, 16), torch.randn(8, 64, 16, 16), (64, 64, 3, 3), geometry
    )
    assert unfold.order_for(problem, "kept") == unfold.order_for(problem, "sq_norms") == "row"
    assert unfold.order_for(problem, "grads") == "position"
    kept = STRATEGIES["unfold"].kept(x, grad, problem)
    assert kept.stride(3) > kept.stride(0)  # the kernel's rows lie outside of the samples
    few = problem.with_samples(1)
    assert unfold.order_for(few, "kept") == "window"


def test_rows_are_not_unfolded_apart_where_their_products_are_thin() -> None:
    for channels, columns in ((1, 8), (2, 16), (3, 24)):
        x, grad = torch.randn(256, channels, 28, 28), torch.randn(256, 16, 14, 14)
        geometry = ConvGeometry(8, stride=2, padding=3)
        _, _, problem = normalise(x, grad, (16, channels, 8, 8), geometry)
        for cpu, least in ((INTEL, 0), (AMD, 16), (AMD_HALVES, 24)):
            with on(cpu):
                by_row = unfold.order_for(problem, "kept") == "row"
            assert by_row == (columns >= least or not torch.backends.mkl.is_available())


@pytest.mark.parametrize(
    ("groups", "rows", "dtype"), [(2, 1, torch.float64), (1, 2, torch.float32), (2, 2, torch.bfloat16)]
)
def test_windows_that_do_not_overlap_in_any_layout(groups: int, rows: int, dtype: torch.dtype) -> None:
    shape, geometry = (6, 16 // groups, 2, 2), ConvGeometry(2, stride=2, groups=groups)
    x, grad = torch.randn(4, 16, 8, 8).to(dtype), torch.randn(4, 6, 4, 4).to(dtype)
    expected = weight_grads(x.double(), grad.double(), shape, geometry, "loop", rows_per_sample=rows)
    for t in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        normal = normalise(t, grad, shape, geometry, rows)
        norms = STRATEGIES["unfold"].sq_norms(*normal)
        torch.testing.assert_close(norms.double(), expected.flatten(1).square().sum(1), rtol=1e-2, atol=1e-4)
        kept = STRATEGIES["unfold"].kept(*normal)
        torch.testing.assert_close(kept.double(), expected, rtol=1e-2, atol=2e-2)


def test_windows_that_do_not_overlap_are_copied_in_the_order_of_x() -> None:
    shape, geometry = (6, 16, 2, 2), ConvGeometry(2, stride=2)
    x, grad = torch.randn(4, 16, 8, 8).double(), torch.randn(4, 6, 4, 4).double()
    last = x.to(memory_format=torch.channels_last)
    kept = [STRATEGIES["unfold"].kept(*normalise(t, grad, shape, geometry)) for t in (x, last)]
    assert kept[0].is_contiguous()
    assert kept[1].stride(2) == 1  # the input's channels are innermost
    close(kept[1], kept[0])


@settings(max_examples=200)
@given(problem=conv_problems())
def test_kept_gradients_are_the_gradients(problem: ConvProblem) -> None:
    kept = kept_weight_grads(*problem.operands, rows_per_sample=problem.rows_per_sample)
    assert kept.shape == (problem.samples, *problem.weight_shape)
    close(kept, problem.oracle())


@given(problem=conv_problems(min_samples=1))
def test_offsets_that_meet_padding_alone_are_known(problem: ConvProblem) -> None:
    x, grad, normal = normalise(*problem.operands, problem.rows_per_sample)
    meetings = oracle.weight_grads(
        torch.ones_like(x),
        torch.ones_like(grad),
        normal.weight_shape,
        stride=normal.geometry.stride,
        padding=normal.geometry.symmetric_padding,
        dilation=normal.geometry.dilation,
        groups=normal.groups,
    )
    known = torch.zeros(normal.weight_shape, dtype=torch.bool)
    for axis, offset in normal.padding_only_offsets:
        known.select(axis, offset).fill_(True)
    assert torch.equal(meetings.sum(0) == 0, known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_that_meet_padding_alone_have_gradient_zero(name: str, dtype: torch.dtype) -> None:
    """Backends have been seen to leave uninitialised memory there."""
    x, grad = torch.ones(2, 4, 1, 1, dtype=dtype), torch.ones(2, 4, 1, 1, dtype=dtype)
    arguments = (x, grad, (4, 4, 3, 3), ConvGeometry(3, stride=2, padding=1))
    if serves(name, "grads", arguments):
        expected = torch.zeros(2, 4, 4, 3, 3, dtype=dtype)
        expected[..., 1, 1] = 1
        assert torch.equal(weight_grads(*arguments, name), expected)
    if serves(name, "sq_norms", arguments):
        assert (weight_grad_sq_norms(*arguments, name) - 16).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [1, 3000])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(problem=conv_problems(min_samples=3))
def test_chunks_of_samples_change_nothing(name: str, budget: int, problem: ConvProblem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_budget(patch, budget)
        if served(name, "grads", problem):
            grads = weight_grads(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
            close(grads, problem.oracle())
        if served(name, "sq_norms", problem):
            norms = weight_grad_sq_norms(*problem.operands, name, rows_per_sample=problem.rows_per_sample)
            close(norms, sq_norms_of(problem.oracle()))


class LargestTemporary(TorchDispatchMode):
    """Bytes of the largest storage that an operator newly made; `numel` of results to leave out."""

    def __init__(self, known: tuple[Tensor, ...], result_bytes: int) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.result_bytes = result_bytes
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                size = t.untyped_storage().nbytes()
                self.largest = max(self.largest, size if size != self.result_bytes else 0)
        return out


def large_problem() -> tuple[Tensor, Tensor, tuple[int, ...], ConvGeometry]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, 9, 9, generator=generator)
    grad = torch.randn(12, 6, 9, 9, generator=generator)
    return x, grad, (6, 4, 3, 3), ConvGeometry(3, padding=1)


def test_unfold_keeps_its_temporaries_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad, shape, geometry = large_problem()
    one_sample = 4 * 9 * 81 * 4
    budget = 2 * one_sample + 5
    set_budget(monkeypatch, budget)
    with LargestTemporary((x, grad), result_bytes=12 * 6 * 4 * 9 * 4) as seen:
        weight_grads(x, grad, shape, geometry, "unfold")
    assert seen.largest == 2 * one_sample
    cost = STRATEGIES["unfold"].cost(normalise(x, grad, shape, geometry)[2], "grads")
    assert seen.largest <= cost.peak_bytes <= budget


@pytest.mark.parametrize(("samples_in_budget", "expected"), [(1, 1), (3, 3), (5, 4), (11, 8), (40, 12)])
def test_a_chunk_keeps_all_threads_busy(
    samples_in_budget: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    set_budget(monkeypatch, 100 * samples_in_budget)
    problem = normalise(*large_problem())[2]
    assert problem.samples == 12
    assert chunking.samples_per_chunk(problem, 100) == expected


@pytest.mark.parametrize("name", ["loop", "grouped", "unfold"])
def test_sq_norms_never_hold_all_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad, shape, geometry = large_problem()
    x, grad = x.repeat(4, 1, 1, 1), grad.repeat(4, 1, 1, 1)
    one_gradient, one_unfolded = 6 * 4 * 9 * 4, 4 * 9 * 81 * 4
    set_budget(monkeypatch, one_unfolded)
    monkeypatch.setattr(problem_module, "is_traced", lambda: False)  # by a mode that only looks: no copies
    with LargestTemporary((x, grad), result_bytes=0) as seen:
        weight_grad_sq_norms(x, grad, shape, geometry, name)
    assert seen.largest <= one_unfolded < len(x) * one_gradient / 3


def test_transposed_output_padding_beyond_the_padding() -> None:
    """Outputs beyond the last position, of which the padding cuts one and a half strides."""
    conv = {"stride": (1, 2), "dilation": (1, 3), "output_padding": (0, 2), "transposed": True, "groups": 2}
    for padding in (((0, 0), (2, 0)), ((0, 0), (0, 1)), ((0, 0), (1, 1))):
        x = torch.randn(2, 2, 1, 2, dtype=torch.float64)[..., : 1 + (padding[1][1] > 0)]
        arguments = {**conv, "padding": padding}
        shape = (2, 1, 1, 1)
        grad = torch.randn_like(oracle.convolve(x, torch.zeros(shape, dtype=x.dtype), **arguments))
        expected = oracle.weight_grads(x, grad, shape, **arguments)
        close(weight_grads(x, grad, shape, ConvGeometry((1, 1), **arguments)), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_contiguous_for_every_layout(name: str, layout: str) -> None:
    x = lay_out(torch.randn(2, 3, 1, 3, dtype=torch.float64), layout)
    grad = lay_out(torch.randn(2, 1, 1, 1, dtype=torch.float64), layout)
    arguments = (x, grad, (1, 3, 1, 2), ConvGeometry((1, 2), dilation=(1, 2)))
    if serves(name, "grads", arguments, 2):
        grads = weight_grads(*arguments, name, rows_per_sample=2)
        assert grads.is_contiguous()
        expected = oracle.weight_grads(x, grad, (1, 3, 1, 2), rows_per_sample=2, dilation=(1, 2))
        close(grads, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_layer_of_real_size(name: str) -> None:
    """Large enough for the backends' fast paths, in float32 and channels_last."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 32, 14, 14, generator=generator).to(memory_format=torch.channels_last)
    grad = torch.randn(3, 48, 7, 7, generator=generator).to(memory_format=torch.channels_last)
    expected = oracle.weight_grads(x, grad, (48, 32, 3, 3), stride=2, padding=1)
    arguments = (x, grad, (48, 32, 3, 3), ConvGeometry(3, 2, 1))
    if serves(name, "grads", arguments):
        grads = weight_grads(*arguments, name)
        torch.testing.assert_close(grads.double(), expected, rtol=1e-4, atol=1e-4)
    if serves(name, "sq_norms", arguments):
        norms = weight_grad_sq_norms(*arguments, name)
        torch.testing.assert_close(norms.double(), sq_norms_of(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(problem=conv_problems())
def test_grads_on_cuda(name: str, problem: ConvProblem) -> None:
    x, grad = problem.x.cuda(), problem.grad_output.cuda()
    rest = (problem.weight_shape, problem.geometry, name)
    if served(name, "grads", problem):
        grads = weight_grads(x, grad, *rest, rows_per_sample=problem.rows_per_sample)
        close(grads.cpu(), problem.oracle())
    if served(name, "sq_norms", problem):
        norms = weight_grad_sq_norms(x, grad, *rest, rows_per_sample=problem.rows_per_sample)
        close(norms.cpu(), sq_norms_of(problem.oracle()))


def test_gram_computes_again_what_cancellation_ate() -> None:
    """x far from zero and output gradients that nearly sum to zero: float32 Gram sums lose every digit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 6, 6, generator=generator) * 1e-3 + 100
    grad = torch.randn(6, 4, 6, 6, generator=generator)
    grad -= grad.mean((2, 3), keepdim=True)
    shape, geometry = (4, 8, 1, 1), ConvGeometry(1)
    norms = weight_grad_sq_norms(x, grad, shape, geometry, "gram")
    exact = sq_norms_of(weight_grads(x.double(), grad.double(), shape, geometry, "loop"))
    # float32 products of 100 by 1 leave 1e-5 of 36 terms in the direct sum itself
    direct = weight_grad_sq_norms(x, grad, shape, geometry, "loop")
    torch.testing.assert_close(norms, direct)
    assert (norms >= 0).all()
    assert (norms.double().sqrt() >= exact.sqrt() - 0.05).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_negative_by_a_bit(name: str) -> None:
    x, grad = torch.randn(3, 6, 5, dtype=torch.complex64).conj().imag, torch.randn(3, 6, 7)
    assert x.is_neg()
    shape, geometry = (6, 2, 3), ConvGeometry(3, padding=2, groups=3)
    exact = oracle.weight_grads(x, grad, shape, padding=2, groups=3)
    if serves(name, "grads", (x, grad, shape, geometry)):
        grads = weight_grads(x, grad, shape, geometry, name)
        torch.testing.assert_close(grads.double(), exact, rtol=1e-4, atol=1e-4)
    if serves(name, "sq_norms", (x, grad, shape, geometry)):
        norms = weight_grad_sq_norms(x, grad, shape, geometry, name)
        torch.testing.assert_close(norms.double(), sq_norms_of(exact), rtol=1e-4, atol=1e-4)


def test_gram_reports_samples_that_are_not_finite() -> None:
    x, grad = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    x[1, 0, 0, 0] = float("nan")
    norms = weight_grad_sq_norms(x, grad, (4, 4, 3, 3), ConvGeometry(3, padding=1), "gram")
    assert norms.isfinite().tolist() == [True, False, True]


def test_gram_keeps_its_temporaries_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(40, 8, 5, 5, generator=generator) for _ in range(2))
    arguments = (x, grad, (8, 8, 3, 3), ConvGeometry(3, padding=1))
    cost = STRATEGIES["gram"].cost(normalise(*arguments)[2], "sq_norms")
    one_sample = cost.peak_bytes // 40
    set_budget(monkeypatch, 3 * one_sample)
    monkeypatch.setattr(problem_module, "is_traced", lambda: False)
    with LargestTemporary((x, grad), result_bytes=0) as seen:
        weight_grad_sq_norms(*arguments, "gram")
    assert seen.largest <= 3 * one_sample
