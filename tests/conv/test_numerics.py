"""Squared norms of long rows are as good as those of short ones."""

import pytest
import torch

from psgrad.conv.numerics import PIECE, squared_norms


@pytest.mark.parametrize("length", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 500_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_long_rows_do_not_come_out_low(length, dtype):
    rows = torch.randn(3, length, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, right = squared_norms(rows), rows.double().square().sum(1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=0)


def test_rows_that_are_not_contiguous():
    rows = torch.randn(20_000, 3).T
    torch.testing.assert_close(squared_norms(rows), rows.square().sum(1))
