"""A captured model that is frozen as a whole, for gradients that go through it, and thawed again."""

import copy

import pytest
import torch
from torch import Tensor, nn

from psgrad import CaptureError, GradNorms, PerSampleGrads, clip_per_sample
from psgrad.ensemble import Ensemble


class Token(nn.Module):
    """A parameter of its own, used as in no rule: it runs one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ torch.diag(self.scale)).tanh()


def discriminator(kind: str) -> nn.Module:
    torch.manual_seed(0)
    first = {"layers": nn.Linear(4, 4), "region": Token(), "embedded": nn.LayerNorm(4)}[kind]
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 1)).double()


def thawed(model: nn.Module, whether: bool) -> None:
    for p in model.parameters():
        p.requires_grad_(whether)


HANDLES = {
    "clip": lambda model: clip_per_sample(model, 0.1),
    "budget": lambda model: clip_per_sample(model, 0.1, memory_budget=1),
    "norms": GradNorms,
    "grads": PerSampleGrads,
}


@pytest.mark.parametrize("handle", HANDLES)
@pytest.mark.parametrize("kind", ["layers", "region", "embedded"])
@pytest.mark.parametrize("first", [True, False])
def test_frozen_as_a_whole_it_runs_as_without_psgrad(kind, handle, first):
    """The input's gradient is the plain one; what is captured before and after is not touched by it."""
    model = discriminator(kind)
    plain = copy.deepcopy(model)
    once = copy.deepcopy(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    HANDLES[handle](model)
    HANDLES[handle](once)

    def through(module: nn.Module) -> Tensor:
        fake = torch.full((2, 4), 0.3, dtype=torch.float64, requires_grad=True)
        module(fake).square().mean().backward()
        return fake.grad

    if not first:
        model(x).square().mean().backward()
        once(x).square().mean().backward()
    thawed(model, False)
    thawed(plain, False)
    assert torch.equal(through(model), through(plain))
    thawed(model, True)
    model(x).square().mean().backward()
    once(x).square().mean().backward()
    for p, expected in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(p.grad, expected.grad)
        if handle == "grads":
            assert torch.equal(p.grad_sample, expected.grad_sample)


def test_a_pass_over_frozen_layers_is_not_gathered():
    model = discriminator("region")
    clip = clip_per_sample(model, 0.1, "sum")
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).sum().backward()
    sums = [p.grad.clone() for p in model.parameters()]
    thawed(model, False)
    x = x.requires_grad_()
    model(x).sum().backward()
    model[0](x).sum().backward()  # a module by itself, too
    assert (clip.gathered.backward_passes, clip.gathered.samples) == (1, 3)
    thawed(model, True)
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), sums, strict=True))


def test_what_was_captured_before_is_finished_after():
    """Forward, frozen for another's backward, thawed, backward."""
    model, x = discriminator("layers"), torch.randn(3, 4, dtype=torch.float64)
    with clip_per_sample(model, 0.1, "sum") as clip:
        loss = model(x).sum()
        thawed(model, False)
        fake = x.clone().requires_grad_()
        model(fake).sum().backward()
        with pytest.raises(CaptureError, match="requires_grad"):
            model(x).sum().add(loss).backward(retain_graph=True)
        thawed(model, True)
        assert clip.gathered.backward_passes == 0
        model(x).sum().backward()
        assert clip.result.norms.shape == (3,)


@pytest.mark.parametrize("how", ["a part frozen", "a part thawed", "another parameter"])
def test_what_is_frozen_in_part_is_refused(how):
    """A parameter would move without being clipped."""
    model, x = discriminator("layers"), torch.randn(3, 4, dtype=torch.float64)
    clip_per_sample(model, 0.1)
    thawed(model, how == "a part frozen")
    if how == "another parameter":
        model[2] = nn.Linear(4, 1).double()
    else:
        model[0].weight.requires_grad_(how == "a part thawed")
    with pytest.raises(CaptureError, match="requires_grad, or the parameter, has changed"):
        model(x)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_an_ensemble_frozen_as_a_whole(strategy):
    members = [discriminator("layers") for _ in range(3)]
    for k, member in enumerate(members):
        nn.init.constant_(member[0].bias, k)
    ensemble = Ensemble.from_modules(members, strategy=strategy)
    plain = copy.deepcopy(ensemble)
    clip = clip_per_sample(ensemble, 0.1, "sum")
    x = torch.full((2, 4), 0.3, dtype=torch.float64)

    def through(module: nn.Module) -> Tensor:
        thawed(module, False)
        fake = x.clone().requires_grad_()
        module(fake).square().sum().backward()
        thawed(module, True)
        return fake.grad

    assert torch.equal(through(ensemble), through(plain))
    assert clip.gathered.backward_passes == 0
    ensemble.loss(lambda out, y: (out - y).square().sum(), x, torch.ones(2, 1).double()).sum().backward()
    before = [p.grad.clone() for p in ensemble.parameters()]
    through(ensemble)
    assert (clip.gathered.backward_passes, clip.gathered.samples) == (1, 6)
    assert all(torch.equal(p.grad, g) for p, g in zip(ensemble.parameters(), before, strict=True))
