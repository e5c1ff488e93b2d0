"""What is asked about factors is looked up once, and never of another tensor or of older values."""

import pytest
import torch

from psgrad.conv.factors import are_ones, remove_some


@pytest.mark.parametrize(
    ("factors", "ones", "some_zero"),
    [
        ([1.0, 1.0], True, False),
        ([1.0, 0.5], False, False),
        ([0.0, 1.0], False, True),
        ([-1.0, 1.0], False, False),
        ([-1.0, 0.0, 1.0], False, True),
        ([float("nan"), 1.0], False, False),
        ([float("nan"), 0.0], False, True),
        ([float("inf"), 1.0], False, False),
        ([], True, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float, torch.double, torch.bfloat16])
def test_what_is_asked(factors, ones, some_zero, dtype):
    t = torch.tensor(factors, dtype=dtype)
    for _ in range(2):
        assert (are_ones(t), remove_some(t)) == (ones, some_zero)


def test_of_many_tensors_and_of_one_that_is_written_to():
    t, other = torch.ones(3), torch.tensor([1.0, 0.0])
    assert are_ones(t)
    assert remove_some(other)
    assert not remove_some(t)
    t[0] = 0
    assert remove_some(t)
    for _ in range(50):  # a new tensor where an old one was
        assert are_ones(torch.ones(2))
        assert remove_some(torch.zeros(2))
