"""A sample adds its clipped gradient once: backward does not go through a forward pass a second time."""

import pytest
import torch
from torch import nn

from psgrad import CaptureError, GradNorms, PerSampleGrads, clip_per_sample
from psgrad.clipping import ClipPerSample, Flat
from psgrad.ensemble import Ensemble
from psgrad.side_by_side import SideBySide


def make(kind):
    torch.manual_seed(0)
    layers = {"layers": nn.Linear(4, 3), "own parameters": nn.PReLU()}
    if kind == "ensemble":
        return Ensemble.from_factory(lambda: nn.Linear(4, 3), range(2))
    return layers[kind]


@pytest.mark.parametrize("kind", ["layers", "own parameters", "ensemble"])
def test_a_second_pass_through_a_forward_pass_is_refused(kind):
    model, x = make(kind), torch.randn(5, 4)
    with clip_per_sample(model, 1e-3, "sum") as clip:
        out = model(x)
        out.sum().backward(retain_graph=True)
        with pytest.raises(CaptureError, match=r"second time.*call backward once"):
            out.square().sum().backward()
        model.zero_grad()
        model(x).sum().backward()  # and all is well again
        assert clip.result.norms.shape[-1] == 5


@pytest.mark.parametrize("handle", [PerSampleGrads, GradNorms])
def test_who_only_looks_may_go_twice(handle):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    with handle(model, "sum"):
        out = model(x)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
    expected = torch.autograd.grad((lambda o: o.sum() + o.square().sum())(model(x)), model.weight)
    torch.testing.assert_close(model.weight.grad, expected[0])


def test_two_losses_of_one_pass_and_a_layer_called_twice_are_one_backward():
    model, x = nn.Linear(4, 4), torch.randn(5, 4)
    with clip_per_sample(model, 1e-3, "sum") as clip:
        out = model(model(x))
        (out.sum() + out.square().sum()).backward()
    assert model.weight.grad.norm() <= 5 * clip.l2_bound * (1 + 1e-5)


def test_parameters_of_one_group_share_one_weighted_sum(monkeypatch):
    """Whatever the sum is scaled by: a layer's weight and bias, and all that is small, come together."""
    made = []
    once = SideBySide.weighted_sum
    monkeypatch.setattr(
        SideBySide, "weighted_sum", lambda self, f: (made.append(len(self.parameters)), once(self, f))[1]
    )
    model, x = nn.Sequential(nn.Conv1d(2, 3, 3), nn.GroupNorm(1, 3), nn.Conv1d(3, 2, 3)), torch.randn(4, 2, 9)
    grads = []
    for into_sum in (False, True):
        clip = ClipPerSample(model, Flat(1e-2), "mean", 1, into_sum=into_sum)
        model(x).square().mean().backward()
        clip.remove()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert made == [6, 6]
    for mean, total in zip(*grads, strict=True):
        torch.testing.assert_close(4 * mean, total)
