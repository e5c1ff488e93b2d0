"""Squared norms of long rows are as good as those of short ones."""

import pytest
import torch

from psgrad.conv.numerics import PIECE, memory_order, squared_norms
from psgrad.layers.base import weighted


@pytest.mark.parametrize("length", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 20_011, 500_000, 524_287])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_long_rows_do_not_come_out_low(length, dtype):
    rows = torch.randn(3, length, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, right = squared_norms(rows), rows.double().square().sum(1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=0)


def test_rows_that_are_not_contiguous():
    rows = torch.randn(20_000, 3).T
    torch.testing.assert_close(squared_norms(rows), rows.square().sum(1))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_any_memory_order_gives_the_same_norms_and_sums(order: tuple[int, ...]) -> None:
    """An order with the samples last has no view of a sample's row: it is copied, not misread."""
    inverse = [order.index(axis) for axis in range(3)]
    grads = torch.randn(5, 3, 4, dtype=torch.float64)
    laid_out = grads.permute(order).contiguous().permute(inverse)
    torch.testing.assert_close(squared_norms(laid_out), grads.square().sum((1, 2)))
    factors = torch.rand(5, dtype=torch.float64)
    total = weighted(factors, laid_out)
    assert total.is_contiguous()
    torch.testing.assert_close(total, torch.einsum("n,nab->ab", factors, grads))


def test_dense_rows_in_any_order_are_read_where_they_lie() -> None:
    grads = torch.randn(5, 3, 2, 2).movedim(1, -1).contiguous().movedim(-1, 1)
    assert grads.permute(0, *memory_order(grads)).flatten(1).data_ptr() == grads.data_ptr()
