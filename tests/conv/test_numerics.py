"""Squared norms of long rows are as good as those of short ones."""

from itertools import permutations

import pytest
import torch

from psgrad.conv.numerics import PIECE, RunningSum, memory_order, squared_norms
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


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 3, 4), (5, 1, 4), (0, 3, 4), (40, 30, 50)])
def test_any_memory_order_gives_the_same_norms_and_sums(order, shape) -> None:
    inverse = [order.index(axis) for axis in range(3)]
    grads = torch.randn(shape, dtype=torch.float64)
    laid_out = grads.permute(order).contiguous().permute(inverse)
    torch.testing.assert_close(squared_norms(laid_out), grads.square().sum((1, 2)))
    factors = torch.rand(len(grads), dtype=torch.float64)
    total, running = weighted(factors, laid_out), RunningSum(torch.float64)
    expected = torch.einsum("n,nab->ab", factors, grads)
    for rows, some in zip(laid_out.split(2), factors.split(2), strict=True):
        running.add(rows, some)
    for found in (total, running.value()):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected)


def test_expanded_gradients_are_those_of_every_sample() -> None:
    """Which no axis lies outside of: the samples have no stride."""
    grads = torch.randn(3, 2).expand(5, 3, 2)
    torch.testing.assert_close(squared_norms(grads), grads.square().sum((1, 2)))
    torch.testing.assert_close(weighted(torch.ones(5), grads), grads.sum(0))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (2, 0, 3, 1), (1, 2, 0, 3)])
def test_dense_rows_in_any_order_are_read_where_they_lie(order: tuple[int, ...]) -> None:
    grads = torch.randn(5, 3, 2, 2).permute(order).contiguous()
    grads = grads.permute([order.index(axis) for axis in range(4)])
    outside, inside = memory_order(grads)
    assert len(outside) == order.index(0)
    rows = grads.permute(*outside, 0, *inside)
    assert rows.is_contiguous()
    assert rows.shape[len(outside)] == 5
