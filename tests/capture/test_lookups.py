"""Rows of a parameter that the batch looks up by index."""

import pytest
import torch
from torch import nn

from psgrad import PerSampleGrads, clip_per_sample
from tests.model_oracle import assert_clipped, assert_written_out


class Looks(nn.Module):
    """`use(table, indices)`, of the batch's whole numbers."""

    def __init__(self, use, *shape):
        super().__init__()
        self.use = use
        self.table = nn.Parameter(torch.randn(shape))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        found = self.use(self.table, x)
        return self.head(found.flatten(1).mean(1, keepdim=True).expand(-1, 2) + found.flatten(1)[:, :2])


KNOWN = {
    "rows": (lambda t, x: t[x], 7, 3),
    "one for each": (lambda t, x: t[x[:, 0]], 7, 3),
    "numbers": (lambda t, x: t[x], 7),
    "matrices": (lambda t, x: t[x[:, 1]], 7, 2, 3),
    "from the end": (lambda t, x: t[x - 7], 7, 3),
    "of 32 bits": (lambda t, x: t[x.int()], 7, 3),
    "index_select": (lambda t, x: torch.index_select(t, 0, x[:, 2]), 7, 3),
    "index_select, by method": (lambda t, x: t.index_select(0, x[:, 2]), 7, 4),
    "index_select, named": (lambda t, x: t.index_select(dim=0, index=x[:, 2]), 7, 4),
    "computed": (lambda t, x: t.tanh()[x], 7, 3),
    "twice": (lambda t, x: t[x] * t[6 - x], 7, 3),
    "users and items": (lambda t, x: t[x[:, :2]] * t[0] + t[x[:, 2:]].sum(1, keepdim=True), 7, 3),
}
UNKNOWN = {
    "other axes": (lambda t, x: t[:, x[:, 0]].mT.flatten(1), 3, 7),
    "index_select, of other axes": (lambda t, x: t.index_select(1, x[:, 0]).mT, 3, 7),
    "made for the occasion": (lambda t, x: t[torch.arange(2)].expand(len(x), 2, 3), 7, 3),
}


@pytest.mark.parametrize(("rows", "rows_per_sample"), [(1, 1), (4, 1), (7, 1), (6, 2)])
@pytest.mark.parametrize("name", KNOWN | UNKNOWN)
def test_exact(name, rows, rows_per_sample):
    torch.manual_seed(0)
    model = Looks(*(KNOWN | UNKNOWN)[name]).double()
    x = torch.randint(7, (rows, 4))
    expected = model(x)
    with PerSampleGrads(model, rows_per_sample=rows_per_sample):
        torch.testing.assert_close(model(x), expected)
    assert assert_clipped(model, x, clip_per_sample, rows_per_sample) == ([""] if name in UNKNOWN else [])


@pytest.mark.parametrize("name", KNOWN)
def test_written_out_and_an_empty_batch(name):
    torch.manual_seed(0)
    assert_written_out(Looks(*KNOWN[name]).double(), lambda rows: torch.randint(7, (rows, 4)))


@pytest.mark.parametrize("number", [7, -8])
def test_an_index_out_of_range_is_an_error_as_without(number):
    model = Looks(*KNOWN["rows"])
    x = torch.randint(7, (4, 4))
    with PerSampleGrads(model):
        model(x)
        x[1, 2] = number
        with pytest.raises(IndexError):
            model(x)
