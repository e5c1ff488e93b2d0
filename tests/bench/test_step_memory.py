"""Peak memory in processes of their own, and the search for the largest batch."""

from __future__ import annotations

import pytest

from psgrad.bench.step_memory import FLOOR, largest_batch, peak_memory


def test_more_samples_take_more_memory_and_written_gradients_take_more_still():
    small, large = (peak_memory("tanh-cnn-28", FLOOR, n) for n in (64, 1024))
    written = peak_memory("tanh-cnn-28", "torch.func", 1024)
    assert 2**20 < small < large < written
    # 1024 gradients of 26,010 floats are 102 MiB
    assert written - large > 80 * 2**20


def test_a_step_that_fails_or_takes_too_long_has_no_peak():
    assert peak_memory("tiny", "nobody", 4) is None
    assert peak_memory("tiny", "backpack", 4) is None
    assert peak_memory("tiny", FLOOR, 4, timeout=0.0) is None


@pytest.mark.parametrize("limit", [0, 1, 3, 15, 16, 17, 100, 511, 8191, 8192, 10**6])
def test_the_largest_batch_is_found_to_an_eighth(limit):
    asked = []

    def fits(n):
        asked.append(n)
        return n <= limit

    found = largest_batch(fits)
    if limit == 0:
        assert found is None
    else:
        assert min(limit, 8192) / 1.125 - 1 <= found <= limit
    assert len(asked) <= 14
    assert max(asked) <= 8192
