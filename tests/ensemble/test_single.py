"""An ensemble of one is the member alone, whatever autograd is asked and whatever is changed in between."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psgrad.ensemble import SGD, Ensemble

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def pair(fn: Callable[[], nn.Module] = small) -> tuple[Ensemble, nn.Module]:
    ens = Ensemble.from_factory(fn, [3])
    return ens, ens.member(0)


def ours(ens: Ensemble) -> Tensor:
    return ens.loss(F.cross_entropy, X.to(ens.stacked[0].weight.dtype), Y).sum()


def theirs(member: nn.Module) -> Tensor:
    return F.cross_entropy(member(X.to(member[0].weight.dtype)), Y)


def same(ens: Ensemble, member: nn.Module) -> None:
    for (name, p), alone in zip(ens.stacked.named_parameters(), member.parameters(), strict=True):
        assert torch.equal(p[0], alone), name
        assert (p.grad is None) == (alone.grad is None), name
        assert p.grad is None or torch.equal(p.grad[0], alone.grad), name
    for b, alone in zip(ens.stacked.buffers(), member.buffers(), strict=True):
        assert torch.equal(b[0], alone)


def backward(ens: Ensemble, member: nn.Module) -> None:
    ours(ens).backward()
    theirs(member).backward()
    same(ens, member)


def test_steps_accumulation_and_gradients_set_to_zero() -> None:
    ens, member = pair()
    optimizers = SGD(ens.parameters(), 0.1, 0.9), torch.optim.SGD(member.parameters(), 0.1, 0.9, fused=True)
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        backward(ens, member)
        backward(ens, member)  # adds
        for optimizer in optimizers:
            optimizer.step()
        same(ens, member)


def test_gradients_asked_for_second_derivatives_and_hooks() -> None:
    ens, member = pair()
    seen: list[torch.Size] = []
    weight = ens.stacked[0].weight
    for _ in range(2):
        found = torch.autograd.grad(ours(ens), list(ens.parameters()))
        expected = torch.autograd.grad(theirs(member), list(member.parameters()))
        assert all(torch.equal(a[0], b) for a, b in zip(found, expected, strict=True))
        handles = [
            weight.register_hook(lambda g: seen.append(g.shape)),
            weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape)),
        ]
    (first,) = torch.autograd.grad(ours(ens), weight, create_graph=True)
    (alone,) = torch.autograd.grad(theirs(member), member[0].weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    (expected_second,) = torch.autograd.grad(alone.square().sum(), member[0].weight)
    torch.testing.assert_close(second[0], expected_second)
    seen.clear()
    ours(ens).backward()
    assert seen.count(weight.shape) == 4, "two hooks, twice"
    for handle in handles:
        handle.remove()
    loss = ours(ens)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert not torch.equal(weight.grad, once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def _freeze(ens: Ensemble, member: nn.Module) -> None:
    ens.stacked[0].weight.requires_grad_(False).grad = None
    member[0].weight.requires_grad_(False).grad = None


def _thaw(ens: Ensemble, member: nn.Module) -> None:
    _freeze(ens, member)
    backward(ens, member)
    ens.stacked[0].weight.requires_grad_(True)
    member[0].weight.requires_grad_(True)


def _data(ens: Ensemble, member: nn.Module) -> None:
    ens.stacked[0].weight.data = torch.ones(1, 5, 4)
    member[0].weight.data = torch.ones(5, 4)


def _strides(ens: Ensemble, member: nn.Module) -> None:
    """The same shape at the same address, read in another order."""
    weight, alone = ens.stacked[0].weight, member[0].weight
    weight.grad = alone.grad = None
    weight.data = weight.data.as_strided((1, 5, 4), (20, 1, 5))
    alone.data = alone.data.as_strided((5, 4), (1, 5))


def _replaced(ens: Ensemble, member: nn.Module) -> None:
    ens.stacked[3].bias = nn.Parameter(torch.ones(1, 3))
    member[3].bias = nn.Parameter(torch.ones(3))


def _layer(ens: Ensemble, member: nn.Module) -> None:
    ens.stacked[2], member[2] = nn.ReLU(), nn.ReLU()


def _dtype(ens: Ensemble, member: nn.Module) -> None:
    for p in [*ens.parameters(), *member.parameters()]:
        p.grad = None
    ens.double()
    member.double()


def _loaded(ens: Ensemble, member: nn.Module) -> None:
    other, alone = pair()
    ens.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in other.state_dict().items()})
    member.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in alone.state_dict().items()})


def _assigned(ens: Ensemble, member: nn.Module) -> None:
    for module in (ens, member):
        module.zero_grad()
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)


def _mode(ens: Ensemble, member: nn.Module) -> None:
    ens.eval()
    member.eval()


def _in_place(ens: Ensemble, member: nn.Module) -> None:
    with torch.no_grad():
        for p in [*ens.parameters(), *member.parameters()]:
            p.mul_(0.5)


@pytest.mark.parametrize(
    "change",
    [_freeze, _thaw, _data, _strides, _replaced, _layer, _dtype, _loaded, _assigned, _mode, _in_place],
)
def test_what_is_changed_between_two_losses_is_seen(change: Callable[..., None]) -> None:
    ens, member = pair()
    backward(ens, member)
    change(ens, member)
    backward(ens, member)
    backward(copy.deepcopy(ens), copy.deepcopy(member))


def test_the_one_that_is_kept_of_several() -> None:
    ens = Ensemble.from_factory(small, [1, 3], strategy="loop")
    ours(ens).backward()
    ens.keep([1])
    member = ens.member(0)
    for p, alone in zip(ens.parameters(), member.parameters(), strict=True):
        alone.grad = p.grad[0].clone()
    backward(ens, member)
    ens.keep([0])
    backward(ens, member)


def test_backward_after_a_step_is_an_error_as_it_is_alone() -> None:
    ens, _ = pair()
    optimizer = SGD(ens.parameters(), 0.1, 0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss = ours(ens)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class _Own(nn.Sequential):
    """Two layers, and something that the test does in between."""

    def __init__(self, what: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(nn.Linear(4, 5), nn.Linear(5, 3))
        self.register_buffer("mean", torch.zeros(5))
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self.what(self, x))


def _recomputed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module[0], x, use_reentrant=False)


def _changes(module: nn.Module, x: Tensor) -> Tensor:
    module[0].weight.mul_(0.5)
    return module[0](x)


def _assigns(module: nn.Module, x: Tensor) -> Tensor:
    out = module[0](x)
    module.mean = 0.9 * module.mean + 0.1 * out.detach().mean(0)
    return out - module.mean


def _misshapes(module: nn.Module, x: Tensor) -> Tensor:
    module.mean = torch.zeros(6)
    return module[0](x)


@pytest.mark.parametrize("what", [_recomputed, _assigns])
@pytest.mark.parametrize("members", [1, 2])
def test_forward_that_runs_again_and_buffers_that_are_assigned(
    what: Callable[..., Tensor], members: int
) -> None:
    ens = Ensemble.from_factory(lambda: _Own(what), range(members), strategy="loop")
    alone = [ens.member(k) for k in range(members)]
    for _ in range(3):
        ours(ens).backward()
        for k, member in enumerate(alone):
            theirs(member).backward()
            for p, q in zip(ens.stacked.parameters(), member.parameters(), strict=True):
                torch.testing.assert_close(p.grad[k], q.grad)
            torch.testing.assert_close(ens.stacked.mean[k], member.mean)


def test_a_parameter_changed_in_place_in_forward_is_refused() -> None:
    ens, _ = pair(lambda: _Own(_changes))
    with pytest.raises(RuntimeError, match="in place"):
        ours(ens)
    with pytest.raises(RuntimeError, match="in place"):
        ours(ens)


@pytest.mark.parametrize("members", [1, 2])
def test_a_buffer_assigned_in_another_shape_is_refused(members: int) -> None:
    ens = Ensemble.from_factory(lambda: _Own(_misshapes), range(members), strategy="loop")
    with pytest.raises(ValueError, match="forward replaces mean"):
        ours(ens)
    assert ens.stacked.mean.shape == (members, 5)


class _Counting(_Own):
    """Counts its steps."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x) / self.steps


def test_forward_that_runs_again_counts_a_step_once() -> None:
    ens, member = pair(lambda: _Counting(_recomputed))
    for step in range(3):
        assert torch.equal(ours(ens).detach(), theirs(member).detach())
        assert ens.stacked.steps == member.steps == step + 1
