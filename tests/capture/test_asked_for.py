"""`backward(inputs=...)`: only the gradients that are named, of captured parameters all or none."""

import pytest
import torch
from torch import nn

from psgrad import CaptureError
from psgrad.ensemble import Ensemble
from tests.capture.test_capture import make
from tests.capture.test_input_gradients import HANDLES, HELD, MODELS, grads_of
from tests.model_oracle import squared_loss

CASES = [(name, handle) for name in MODELS for handle in HANDLES if (name, handle) != HELD]


@pytest.mark.parametrize(("name", "handle"), CASES)
def test_naming_all_parameters_is_as_naming_none(name, handle):
    model, x = make(name)
    with HANDLES[handle](model):
        squared_loss(model, x).backward()
        expected = grads_of(model)
        model.zero_grad()
        squared_loss(model, x).backward(inputs=list(model.parameters()))
    assert all(grad is not None for grad in expected.values())
    torch.testing.assert_close(grads_of(model), expected)


@pytest.mark.parametrize("handle", HANDLES)
def test_naming_the_input_as_well(handle):
    model, x = make("in-place residual")
    x, frozen = x.requires_grad_(), x.detach()
    squared_loss(model, x).backward()
    of_input = x.grad
    x.grad = None
    model.zero_grad()
    with HANDLES[handle](model):
        squared_loss(model, frozen).backward()
        expected = grads_of(model)
        model.zero_grad()
        torch.autograd.backward(squared_loss(model, x), inputs=[x, *model.parameters()])
    torch.testing.assert_close(x.grad, of_input)
    torch.testing.assert_close(grads_of(model), expected)


def test_naming_them_by_position():
    model, x = make("in-place residual")
    with HANDLES["clip"](model):
        torch.autograd.backward(squared_loss(model, x), None, None, False, None, list(model.parameters()))
    assert all(grad is not None for grad in grads_of(model).values())


@pytest.mark.parametrize("handle", HANDLES)
def test_naming_the_input_alone_leaves_the_parameters_alone(handle):
    model, x = make("in-place residual")
    x.requires_grad_()
    with HANDLES[handle](model):
        squared_loss(model, x).backward(inputs=x)
        assert x.grad is not None
        assert set(grads_of(model).values()) == {None}


@pytest.mark.parametrize("handle", HANDLES)
def test_naming_some_parameters_is_refused_by_the_paths_of_the_others(handle):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with HANDLES[handle](model):
        loss = model(torch.randn(5, 3)).square().mean()
        with pytest.raises(CaptureError, match=r"not 0\.weight, 0\.bias: .* Name all of them, or freeze"):
            loss.backward(inputs=list(model[2].parameters()))
        assert set(grads_of(model).values()) == {None}
        loss.backward()
        assert all(grad is not None for grad in grads_of(model).values())


def test_two_attached_models_and_only_one_is_named():
    """As a GAN's discriminator is trained, without a gradient of the generator."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    x = torch.randn(5, 3)
    with HANDLES["clip"](first), HANDLES["clip"](second):
        second(first(x)).square().mean().backward()
        expected = grads_of(second)
        first.zero_grad()
        second.zero_grad()
        second(first(x)).square().mean().backward(inputs=list(second.parameters()))
    assert set(grads_of(first).values()) == {None}
    torch.testing.assert_close(grads_of(second), expected)


class Sorted(nn.Module):
    """Runs as a loop over members."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x.sort(1).values) * (1 if bool(self.linear.weight.sum() > 0) else 2)


@pytest.mark.parametrize("member", [lambda: nn.Linear(3, 2), Sorted], ids=["folded", "looped"])
@pytest.mark.parametrize("handle", ["grads", "norms", "clip"])
def test_of_an_ensemble(handle, member):
    ensemble = Ensemble.from_factory(member, seeds=range(3))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    with HANDLES[handle](ensemble):
        ensemble.loss(nn.functional.mse_loss, x, y).sum().backward()
        expected = grads_of(ensemble)
        ensemble.zero_grad()
        ensemble.loss(nn.functional.mse_loss, x, y).sum().backward(inputs=list(ensemble.parameters()))
        torch.testing.assert_close(grads_of(ensemble), expected)
        with pytest.raises(CaptureError, match=r"not .*bias"):
            ensemble.loss(nn.functional.mse_loss, x, y).sum().backward(inputs=next(ensemble.parameters()))


@pytest.mark.usefixtures("unwatched")
def test_it_ends_with_the_last_handle():
    before = torch.autograd.backward
    model = nn.Linear(3, 2)
    handle = HANDLES["grads"](model)
    assert torch.autograd.backward is not before
    handle.remove()
    assert torch.autograd.backward is before
