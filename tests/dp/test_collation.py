"""Batches of no samples, which have the form of the others."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from operator import attrgetter

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from psgrad import ConfigError
from tests.dp.problems import private, train

Pair = namedtuple("Pair", "x y")


class Items(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.make(torch.full((3,), float(i)))


@dataclass
class Record:
    x: torch.Tensor
    y: int = 1


def lists(samples):
    return tuple(zip(*samples, strict=True))


def time_first(samples):
    return torch.stack([x for x, _ in samples], 1), torch.tensor([y for _, y in samples])


def longest(samples):
    return torch.stack(samples), 3, None


def records(samples):
    return torch.stack([record.x for record in samples]), torch.tensor([record.y for record in samples])


def mapping(samples):
    return UserDict(default_collate(samples))


CASES = {
    "a number": (lambda x: float(x[0]), default_collate, lambda b: b.shape == (0,)),
    "a scalar": (lambda x: x[0], default_collate, lambda b: b.shape == (0,)),
    "a tensor": (lambda x: x, default_collate, lambda b: b.shape == (0, 3)),
    "one in a list": (lambda x: [x], default_collate, lambda b: len(b) == 1 and b[0].shape == (0, 3)),
    "names": (lambda x: (x, "name"), default_collate, lambda b: b[0].shape == (0, 3) and not len(b[1])),
    "a named tuple": (lambda x: Pair(x, 1), default_collate, lambda b: b.x.shape == (0, 3)),
    "nested": (
        lambda x: {"a": {"x": x}, "y": (1, x)},
        default_collate,
        lambda b: b["a"]["x"].shape == (0, 3),
    ),
    "a mapping": (lambda x: {"x": x}, mapping, lambda b: isinstance(b, UserDict) and b["x"].shape == (0, 3)),
    "lists": (lambda x: (x, 1), lists, lambda b: b == ((), ())),
    "records": (Record, records, lambda b: b[0].shape == (0, 3) and b[1].dtype == torch.int64),
    "time first": (lambda x: (x, 1), time_first, lambda b: b[0].shape == (3, 0)),
    "longest": (lambda x: x, longest, lambda b: b[1:] == (3, None) and not len(b[0])),
    "padded": (lambda x: x, lambda s: torch.stack([*s, *[s[0] * 0] * (8 - len(s))]), lambda b: not len(b)),
}


@pytest.mark.parametrize(("make", "collate", "is_empty"), CASES.values(), ids=list(CASES))
def test_an_empty_batch_has_the_form_of_the_others(make, collate, is_empty):
    _, _, loader = private(loader=DataLoader(Items(make), batch_size=2, collate_fn=collate))
    assert is_empty(loader.collate_fn([]))
    assert not is_empty(loader.collate_fn([loader.dataset[1]]))
    again = private(loader=loader)[2]  # the engine's own loader, given once more
    assert is_empty(again.collate_fn([]))


def test_what_has_no_empty_form_is_an_error_only_where_one_is_asked_for():
    _, _, loader = private(loader=DataLoader(Items(Record), batch_size=2, collate_fn=lambda s: s[0]))
    assert isinstance(loader.collate_fn([loader.dataset[0]]), Record)
    with pytest.raises(ConfigError, match="collate_fn makes a Record"):
        loader.collate_fn([])


def test_a_data_set_that_fails_leaves_nothing_attached():
    model, optimizer, loader = private()
    optimizer.clip.remove()
    with pytest.raises(AttributeError):
        private(model=model, loader=DataLoader(Items(attrgetter("missing")), batch_size=2))
    train(*private(model=model, loader=loader))
