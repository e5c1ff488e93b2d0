"""Own data in dicts reaches every member also where members are captured."""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import ShapeError, clip_per_sample
from psgrad.ensemble import Ensemble


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch):
        return self.layer(batch["x"])


def test_own_trees_of_captured_members():
    ensemble = Ensemble.from_factory(OfDict, range(2))
    x = torch.randn(2, 5, 4)
    with clip_per_sample(ensemble, 1e6, "sum"):
        ensemble.own({"x": x}).square().sum().backward()
    for k in range(2):
        member = ensemble.member(k)
        member({"x": x[k]}).square().sum().backward()
        torch.testing.assert_close(ensemble.stacked.layer.weight.grad[k], member.layer.weight.grad)


def test_own_data_in_what_is_no_tree_is_refused():
    ensemble = Ensemble.from_factory(OfDict, range(2))
    batch = UserDict(x=torch.randn(2, 5, 4))
    with pytest.raises(ShapeError, match="a UserDict holds tensors"):
        ensemble.own(batch)
    with pytest.raises(ShapeError, match="a UserDict holds tensors"):
        ensemble.loss(F.mse_loss, batch, torch.zeros(2, 5, 3), own=True)
    assert ensemble(batch).shape == (2, 2, 5, 3)  # shared, members take it as it is
