"""Two ways to the Gram matrix of the patches, and what must not enter it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from torch.overrides import TorchFunctionMode

from psgrad.conv import ConvGeometry, weight_grad_sq_norms
from psgrad.conv.problem import normalise
from psgrad.conv.strategies.gram.mapped import few_positions, mapped
from psgrad.conv.strategies.gram.shifted import shifted
from tests import oracle
from tests.problems import ConvProblem, conv_problems


@settings(max_examples=300)
@given(problem=conv_problems(min_samples=1))
def test_maps_and_shifts_give_the_same_gram_matrix(problem: ConvProblem) -> None:
    x, _, normal = normalise(*problem.operands, problem.rows_per_sample)
    assume(few_positions(normal))
    # in maps of all axes at once and of one at a time
    with_maps, with_shifts = mapped(x, normal), shifted(x, normal)
    assert with_maps.shape == with_shifts.shape
    assert torch.allclose(with_maps, with_shifts, rtol=1e-10, atol=1e-10)


def test_axes_are_mapped_one_at_a_time_where_the_whole_map_would_be_large() -> None:
    x = torch.randn(6, 3, 7, 8, dtype=torch.float64)
    geometry = ConvGeometry((3, 5), stride=(1, 2), padding=(1, 2))
    grad = torch.randn(6, 4, 7, 4, dtype=torch.float64)
    _, _, normal = normalise(x, grad, (4, 3, 3, 5), geometry, 2)
    assert few_positions(normal)
    assert torch.allclose(mapped(x, normal), shifted(x, normal), rtol=1e-12, atol=1e-12)
    volume, kernel = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64), (2, 3, 2)
    small = ConvGeometry(kernel, padding=(0, 1, 1))
    _, _, normal = normalise(volume, torch.randn(3, 2, 2, 4, 6).double(), (2, 2, *kernel), small)
    assert few_positions(normal)
    assert torch.allclose(mapped(volume, normal), shifted(volume, normal), rtol=1e-12, atol=1e-12)


def test_a_position_that_no_output_reads_may_hold_anything() -> None:
    x, grad = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 2, 2)
    x[:, :, 2] = float("nan")  # stride 3, kernel 2: rows 0, 1, 3, 4 are read
    norms = weight_grad_sq_norms(x, grad, (4, 4, 2, 2), ConvGeometry(2, stride=3), "gram")
    assert norms.isfinite().all()


class RoundedProducts(TorchFunctionMode):
    """Matrix products of a device that rounds what it multiplies, and adds up in float32."""

    PRODUCTS = (torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = tuple(t.bfloat16().float() for t in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [4, 6])
def test_where_products_are_allowed_to_round_a_gram_matrix_is_not_rounded(size):
    """Its entries cancel: with the whole matrix rounded, norms came out up to a tenth too low."""
    x = (torch.randn(64, 64, size, size) + 12).bfloat16().float()
    half = torch.randn(64, 64, size - 2, (size - 2) // 2).bfloat16().float()
    grad = torch.cat([half, -half], 3)
    expected = oracle.weight_grads(x, grad, (64, 64, 3, 3)).flatten(1).square().sum(1)
    torch.set_float32_matmul_precision("medium")
    try:
        with RoundedProducts():
            norms = weight_grad_sq_norms(x, grad, (64, 64, 3, 3), ConvGeometry(3), "gram")
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(norms.double(), expected, rtol=1e-3, atol=0)
