"""The layout verbs against their definition, for every position of the vmapped axis."""

from __future__ import annotations

import itertools

import pytest
import torch

from psgrad.conv.layout import make_dummy, move_batch_dim_to_front, reshape_dim_into, reshape_dim_outof
from psgrad.errors import ShapeError

SHAPE = (2, 3, 5)  # N C S without the vmapped axis
B = 4


def batched(bdim: int) -> torch.Tensor:
    """Entry [b, n, c, s] is a number of its own; B is at `bdim`."""
    return torch.arange(B * 30).reshape(B, *SHAPE).movedim(0, bdim)


@pytest.mark.parametrize(("bdim", "dim"), list(itertools.product(range(4), range(3))))
def test_reshape_dim_into_merges_b_outer(bdim: int, dim: int) -> None:
    t = batched(bdim)
    merged = reshape_dim_into(bdim, dim, t)
    shape = list(SHAPE)
    shape[dim] *= B
    assert list(merged.shape) == shape
    for b in range(B):
        block = merged.narrow(dim, b * SHAPE[dim], SHAPE[dim])
        assert torch.equal(block, t.select(bdim, b))
    assert torch.equal(reshape_dim_into(bdim - 4, dim - 3, t), merged)


@pytest.mark.parametrize(("bdim", "dim"), list(itertools.product(range(4), range(3))))
def test_reshape_dim_outof_undoes_it(bdim: int, dim: int) -> None:
    t = batched(bdim)
    split = reshape_dim_outof(dim, B, reshape_dim_into(bdim, dim, t))
    assert torch.equal(split, t.movedim(bdim, dim))


@pytest.mark.parametrize("bdim", [*range(4), -1])
def test_move_batch_dim_to_front(bdim: int) -> None:
    assert torch.equal(move_batch_dim_to_front(batched(bdim % 4), bdim), batched(0))
    t = batched(2)
    assert move_batch_dim_to_front(t, None) is t


@pytest.mark.parametrize(("bdim", "dim"), list(itertools.product((0, 1, 3, None), range(3))))
def test_make_dummy_has_the_shape_and_one_element(bdim: int | None, dim: int) -> None:
    t = torch.zeros(SHAPE, dtype=torch.float64) if bdim is None else batched(bdim).double()
    dummy = make_dummy(t, bdim, dim, 7)
    shape = list(SHAPE)
    shape[dim] *= 7
    assert list(dummy.shape) == shape
    assert dummy.dtype == torch.float64
    assert dummy.untyped_storage().nbytes() == 8


def test_empty_axes() -> None:
    assert reshape_dim_into(0, 1, torch.zeros(0, 2, 3)).shape == (2, 0)
    assert reshape_dim_outof(1, 0, torch.zeros(2, 0)).shape == (2, 0, 0)
    assert reshape_dim_outof(1, 4, torch.zeros(2, 0)).shape == (2, 4, 0)


def test_positions_and_sizes_that_do_not_exist_raise() -> None:
    t = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"bdim 2 .* 2 axes"):
        move_batch_dim_to_front(t, 2)
    with pytest.raises(ShapeError, match="bdim -3"):
        reshape_dim_into(-3, 0, t)
    with pytest.raises(ShapeError, match=r"dim 1 .* 1 axes"):
        reshape_dim_into(0, 1, t)
    with pytest.raises(ShapeError, match=r"axis 1 of \(2, 3\) .* 2 equal"):
        reshape_dim_outof(1, 2, t)
    with pytest.raises(ShapeError, match="0 equal"):
        reshape_dim_outof(1, 0, t)
    with pytest.raises(ShapeError, match="bdim 3"):
        make_dummy(t, 3, 0, 2)
