"""Blocks of memory that one owner lends out again and again."""

from __future__ import annotations

import threading

import pytest
import torch

from psgrad.conv import reused
from psgrad.conv.reused import SMALLEST, Blocks, borrowed

SIZE = SMALLEST // 4 + 1
LIKE = torch.empty(0)


def lent(blocks: Blocks, size: int = SIZE, like: torch.Tensor = LIKE) -> torch.Tensor:
    with blocks.lending():
        return borrowed((size,), like)


def test_what_was_taken_back_is_lent_again_and_what_was_not_is_not() -> None:
    blocks = Blocks()
    first, second = lent(blocks), lent(blocks)
    assert first.data_ptr() != second.data_ptr()
    blocks.take_back()
    again = {lent(blocks).data_ptr(), lent(blocks).data_ptr()}
    assert again == {first.data_ptr(), second.data_ptr()}
    assert lent(blocks).data_ptr() not in again


def test_a_batch_a_little_larger_has_room_in_the_same_block() -> None:
    blocks = Blocks()
    first = lent(blocks)
    blocks.take_back()
    assert lent(blocks, SIZE + SIZE // 10).data_ptr() == first.data_ptr()


def test_what_nobody_borrowed_meanwhile_goes() -> None:
    blocks = Blocks()
    lent(blocks), lent(blocks)
    blocks.take_back()
    lent(blocks)
    blocks.take_back()
    assert len(blocks._free) == 1
    blocks.take_back()
    assert not blocks._free


def test_no_more_stays_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused, "MOST", 3 * SMALLEST)
    blocks = Blocks()
    for _ in range(5):
        lent(blocks)
    blocks.take_back()
    assert sum(block.nbytes for block in blocks._free) <= 3 * SMALLEST


def test_two_owners_dtypes_and_threads_share_nothing() -> None:
    one, other = Blocks(), Blocks()
    first = lent(one)
    one.take_back()
    assert lent(other).data_ptr() != first.data_ptr()
    assert lent(one, like=LIKE.double()).dtype == torch.float64
    elsewhere: list[torch.Tensor] = []
    with one.lending():
        thread = threading.Thread(target=lambda: elsewhere.append(borrowed((SIZE,), LIKE)))
        thread.start()
        thread.join()
    assert len(one._lent) == 1  # the float64 one: the other thread has no lender
    assert elsewhere[0].shape == (SIZE,)


def test_small_and_wrapped_tensors_are_new() -> None:
    blocks = Blocks()
    lent(blocks, 10)
    with blocks.lending():
        torch.vmap(lambda row: borrowed((SIZE,), row).zero_() + row.sum())(torch.ones(2, 3))
    assert not blocks._lent


def test_the_lender_of_before_is_back_after_an_error() -> None:
    outer, inner = Blocks(), Blocks()
    with outer.lending():
        with pytest.raises(RuntimeError), inner.lending():
            raise RuntimeError
        borrowed((SIZE,), LIKE)
    assert len(outer._lent) == 1
    assert not inner._lent
