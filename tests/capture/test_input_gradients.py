"""`torch.autograd.grad`: of an input (an attack, a saliency map) as ever; of parameters refused."""

import itertools

import pytest
import torch
from torch import nn

from psgrad import GradNorms, PerSampleGrads, clip_per_sample
from psgrad.ensemble import Ensemble
from psgrad.errors import CaptureError, ConfigError
from tests.capture.test_capture import make
from tests.capture.unknown import product
from tests.model_oracle import grads_one_by_one, squared_loss

HANDLES = {
    "grads": PerSampleGrads,
    "norms": GradNorms,
    "clip": lambda model: clip_per_sample(model, 1.0),
    "clip in a budget": lambda model: clip_per_sample(model, 1.0, memory_budget=10**8),
    "clip in two passes": lambda model: clip_per_sample(model, 1.0, memory_budget=1),
}


def grads_of(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


MODELS = ("in-place residual", "layers called twice", "own parameters")
HELD = ("layers called twice", "clip in two passes")
"""What is used twice has to be held, which a budget of one byte refuses."""


@pytest.mark.parametrize(
    ("name", "handle"), [case for case in itertools.product(MODELS, HANDLES) if case != HELD]
)
def test_it_is_as_without_psgrad_and_leaves_parameters_alone(name, handle):
    model, x = make(name)
    x = x.requires_grad_()
    (expected,) = torch.autograd.grad(squared_loss(model, x), x)
    squared_loss(model, x).backward()
    model.zero_grad()
    with HANDLES[handle](model) as attached:
        (found,) = torch.autograd.grad(squared_loss(model, x), x)
        torch.testing.assert_close(found, expected)
        assert not any(grad is not None for grad in grads_of(model).values())
        assert not any(hasattr(p, "grad_sample") for p in model.parameters())
        if handle.startswith("clip"):
            assert attached.gathered.backward_passes == 0
            with pytest.raises(ConfigError, match="no backward pass"):
                _ = attached.result
        squared_loss(model, (x + 0.1 * found.sign()).detach()).backward()
        after = grads_of(model)
        squared_loss(model, x).backward(inputs=[x])
        assert all(torch.equal(after[name], grad) for name, grad in grads_of(model).items())
    with HANDLES[handle](model):
        model.zero_grad()
        squared_loss(model, (x + 0.1 * found.sign()).detach()).backward()
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, after[name])


def test_the_same_graph_gives_the_parameters_gradients_afterwards():
    model, x = make("in-place residual")
    x = x.requires_grad_()
    squared_loss(model, x).backward()
    ordinary = grads_of(model)
    model.zero_grad()
    with PerSampleGrads(model):
        loss = squared_loss(model, x)
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, ordinary[name])


def test_a_jacobian_of_inputs():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(2, 4)
    expected = torch.autograd.functional.jacobian(model, x)
    with clip_per_sample(model, 1.0) as clip:
        torch.testing.assert_close(torch.autograd.functional.jacobian(model, x), expected)
        assert clip.gathered.backward_passes == 0
    assert all(p.grad is None for p in model.parameters())


def penalty(model, x):
    """A loss of the output and of its gradient, as of a critic or a physics-informed network."""
    x = x.detach().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return out.square().flatten(1).sum(1).mean() + (slope.flatten(1).sum(1) - 1).square().mean()


LAST = {
    "a layer": lambda: nn.Linear(4, 2),
    "layers": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("handle", ["grads", "norms", "clip", "clip in a budget"])
@pytest.mark.parametrize("last", LAST)
def test_a_penalty_on_the_gradient_is_refused_also_where_only_parameters_have_one(last, handle):
    model, x = LAST[last]().double(), torch.randn(5, 4, dtype=torch.double)
    with HANDLES[handle](model), pytest.raises(CaptureError, match="depends on a gradient through the model"):
        penalty(model, x.sin()).backward()


class Projects(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return product(x, self.weight).tanh()


def test_a_penalty_on_the_gradient_of_what_uses_its_parameters_itself():
    model, x = Projects().double(), torch.randn(5, 4, dtype=torch.double)
    expected = grads_one_by_one(model, penalty, [x])
    with PerSampleGrads(model):
        penalty(model, x).backward()
    torch.testing.assert_close(model.weight.grad_sample, expected["weight"])


def test_of_an_ensemble():
    ensemble = Ensemble.from_factory(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)), range(2)
    )
    x = torch.randn(4, 2, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(ensemble(x).square().sum(), x)
    with clip_per_sample(ensemble, 1.0, "sum") as clip:
        (found,) = torch.autograd.grad(ensemble(x).square().sum(), x)
        assert clip.gathered.backward_passes == 0
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in ensemble.parameters())


@pytest.mark.parametrize("allow_unused", [False, True])
@pytest.mark.parametrize("handle", HANDLES)
def test_of_parameters_it_is_refused(handle, allow_unused):
    model, x = make("in-place residual")
    with HANDLES[handle](model):
        loss = squared_loss(model, x) + sum(p.square().sum() for p in model.parameters())
        for asked in (model.parameters(), next(model.parameters()), dict(model.named_parameters())):
            with pytest.raises(CaptureError, match=r"autograd\.grad .*conv1\.weight.*loss\.backward\(\)"):
                torch.autograd.grad(loss, asked, allow_unused=allow_unused)


def test_of_parameters_beside_the_model_it_is_as_without_psgrad():
    model = nn.Linear(3, 2)
    before = model(torch.randn(4, 3)).sum()
    plain = torch.autograd.grad
    with PerSampleGrads(model):
        (found,) = torch.autograd.grad(model.weight.square().sum(), model.weight)
        torch.testing.assert_close(found, 2 * model.weight)
        _, found = torch.autograd.grad(before, model.parameters())
        torch.testing.assert_close(found, torch.full((2,), 4.0))
    assert torch.autograd.grad is plain
