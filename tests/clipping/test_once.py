"""A sample adds its clipped gradient once: backward does not go through a forward pass a second time."""

import pytest
import torch
from torch import nn

from psgrad import CaptureError, GradNorms, PerSampleGrads, clip_per_sample
from psgrad.ensemble import Ensemble


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
