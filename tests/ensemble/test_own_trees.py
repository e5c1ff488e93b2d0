"""Own data in dicts reaches every member also where members are captured."""

import torch
from torch import nn

from psgrad import clip_per_sample
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
