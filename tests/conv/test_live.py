"""The live part of a kernel: nothing alive is cut off, nothing dead is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psgrad.conv import ConvGeometry, live, weight_grads, weighted_weight_grad
from psgrad.conv.live import live_kernel, worth_cropping
from psgrad.conv.problem import normalise, problem_of
from psgrad.conv.sum_planner import live_in_sum
from psgrad.conv.verbs import kept_weight_grads
from tests import oracle
from tests.machines import AMD, INTEL, on
from tests.problems import ConvProblem, conv_problems


@settings(max_examples=300)
@given(problem=conv_problems(min_samples=1))
def test_the_live_box_is_the_smallest_that_holds_every_meeting(problem: ConvProblem) -> None:
    x, grad, normal = normalise(*problem.operands, problem.rows_per_sample)
    found = live_kernel(normal)
    meetings = oracle.weight_grads(
        torch.ones_like(x),
        torch.ones_like(grad),
        normal.weight_shape,
        stride=normal.geometry.stride,
        padding=normal.geometry.symmetric_padding,
        dilation=normal.geometry.dilation,
        groups=normal.groups,
    ).sum((0, 1, 2))
    alive = meetings.nonzero()
    if found is None:
        full = list(meetings.shape)
        if len(alive):
            assert (alive.amax(0) - alive.amin(0) + 1).tolist() == full
        return
    rank = meetings.ndim
    before = [found.dead[2 * (rank - 1 - axis)] for axis in range(rank)]
    cropped = found.problem.geometry.kernel_size
    assert cropped is not None
    if len(alive):
        assert alive.amin(0).tolist() == before
        assert (alive.amax(0) - alive.amin(0) + 1).tolist() == list(cropped)
    assert tuple(found.crop(x).shape[2:]) == found.problem.input_size
    assert found.problem.output_size == normal.output_size


class Products(TorchDispatchMode):
    """Shapes that `convolution_backward` was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.weights.append(tuple(args[2].shape))
        return func(*args, **(kwargs or {}))


def test_a_kernel_larger_than_its_input_costs_what_is_alive() -> None:
    x, grad = torch.randn(8, 64, 1, 200), torch.randn(8, 64, 1, 200)
    with Products() as products:
        summed = weighted_weight_grad(x, grad, (64, 64, 3, 3), ConvGeometry(3, padding=1), torch.ones(8))
    assert {weight[2:] for weight in products.weights} == {(1, 3)}
    assert summed.shape == (64, 64, 3, 3)
    assert not summed[:, :, 0].any()


def test_a_dense_kernel_is_cropped_only_where_that_saves_more_than_the_zeros_cost() -> None:
    def worth(*shape: int, results: int, dilation: int = 1, groups: int = 1) -> bool:
        x = torch.empty(shape, device="meta")
        geometry = ConvGeometry(3, padding=dilation, dilation=dilation, groups=groups)
        problem = problem_of(x, x, (shape[1], shape[1] // groups, 3, 3), geometry)
        assert live_kernel(problem) is not None
        return worth_cropping(problem, results) is not None

    assert not worth(8, 64, 1, 1, results=8)  # an outer product: the zeros are the smaller part
    assert worth(8, 64, 1, 1, results=8, groups=64)
    assert worth(8, 64, 8, 8, results=8, dilation=12)  # one of nine offsets
    assert not worth(8, 64, 1, 4, results=8)
    assert worth(64, 64, 1, 16, results=1)  # one gradient, of all samples


@pytest.mark.parametrize("rows_per_sample", [1, 2])
@pytest.mark.parametrize("samples", [0, 1, 8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_zeros_go_around_single_elements_where_that_is_faster_than_their_products(
    samples: int, rows_per_sample: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    rows = samples * rows_per_sample
    x = torch.randn(rows, 16, 1, 2).contiguous(memory_format=memory_format)[..., :1]  # with gaps
    grad, factors = torch.randn(rows, 32, 1, 1).to(memory_format=memory_format), torch.rand(samples)
    shape, geometry = (32, 16, 3, 3), ConvGeometry(3, padding=1)
    weighed = factors.repeat_interleave(rows_per_sample).double()
    expected = torch.einsum("n,no,ni->oi", weighed, grad[..., 0, 0].double(), x[..., 0, 0].double())
    for machine, cropped in ((AMD, True), (INTEL, False)):
        with on(machine):
            summed = weighted_weight_grad(x, grad, shape, geometry, factors, rows_per_sample=rows_per_sample)
            found = live_in_sum(problem_of(x, grad, shape, geometry, rows_per_sample))
        assert (found is not None) is cropped
        torch.testing.assert_close(summed[:, :, 1, 1].double(), expected, rtol=1e-5, atol=1e-6)
        assert int(summed.count_nonzero()) == int(expected.count_nonzero())


@pytest.mark.parametrize("rate", [0, 10**9], ids=["cropped", "whole"])
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=conv_problems(min_samples=1))
def test_cropped_or_whole_the_gradients_are_the_same(
    rate: int, problem: ConvProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FLOPS_PER_BYTE", rate)
    worth_cropping.cache_clear()
    expected = problem.oracle()
    keywords = {"rows_per_sample": problem.rows_per_sample}
    for got in (
        weight_grads(*problem.operands, **keywords),
        kept_weight_grads(*problem.operands, **keywords),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    factors = torch.linspace(-1, 1, problem.samples, dtype=torch.float64)
    got = weighted_weight_grad(*problem.operands, factors, **keywords)
    torch.testing.assert_close(got, torch.einsum("n,n...->...", factors, expected), rtol=1e-9, atol=1e-10)
    worth_cropping.cache_clear()


def test_one_output_position_is_a_matrix_product() -> None:
    x, grad, factors = torch.randn(4, 3, 5, 4).double(), torch.randn(4, 2, 1, 1).double(), torch.rand(4)
    geometry = ConvGeometry((5, 4), stride=7, padding=(1, 2), dilation=(1, 2))
    with Products() as products:
        actual = weighted_weight_grad(x, grad, (2, 3, 5, 4), geometry, factors.double())
    assert not products.weights
    expected = _reference(x, grad, (2, 3, 5, 4), geometry, factors.double())
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def _reference(
    x: Tensor, grad: Tensor, shape: tuple[int, ...], geometry: ConvGeometry, factors: Tensor
) -> Tensor:
    grads = oracle.weight_grads(
        x,
        grad,
        shape,
        stride=geometry.stride,
        padding=geometry.symmetric_padding,
        dilation=geometry.dilation,
        groups=1,
    )
    return torch.tensordot(factors, grads, 1)


def test_one_output_position_is_a_matrix_product_for_every_group() -> None:
    x, grad = torch.randn(5, 6, 1, 1).double(), torch.randn(5, 9, 1, 1).double()
    factors, geometry = torch.rand(5).double(), ConvGeometry(7, padding=3, groups=3)
    with Products() as products:
        actual = weighted_weight_grad(x, grad, (9, 2, 7, 7), geometry, factors)
    assert not products.weights
    weight = torch.zeros(9, 2, 7, 7, dtype=torch.double, requires_grad=True)
    out = torch.conv2d(x, weight, padding=3, groups=3)
    (expected,) = torch.autograd.grad(out, weight, grad * factors.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(actual, expected)


def test_gradients_are_contiguous_with_the_zeros_around_them():
    """Axes of one element pass for channels last, which padding keeps."""
    x = torch.randn(3, 3, 3, 1).expand(-1, -1, -1, 3)
    grad = torch.randn(3, 1, 3, 3).permute(3, 0, 1, 2)
    geometry = ConvGeometry((2, 1), 3, (1, 2), 3, groups=3)
    grads = weight_grads(x, grad, (3, 1, 2, 1), geometry, "correlate", rows_per_sample=3)
    assert grads.is_contiguous()
