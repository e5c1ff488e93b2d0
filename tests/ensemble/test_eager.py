"""Members one after the other: gradients taken at once are those of an ordinary backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.ensemble import Ensemble


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


def both() -> tuple[Ensemble, Ensemble]:
    return (Ensemble.from_factory(small, range(3), strategy=how) for how in ("loop", "folded"))


def test_weighted_losses_and_parameters_outside_get_their_gradients() -> None:
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(0, 3, (6,))
    found = []
    for ens in both():
        scale = torch.tensor(0.7, requires_grad=True)
        shifted = x * 2.0

        def loss(out: Tensor, target: Tensor, scale: Tensor = scale) -> Tensor:
            return F.cross_entropy(out * scale, target)

        x.grad = None
        losses = ens.loss(loss, shifted, y)
        (losses * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
        found.append([losses.detach(), scale.grad, x.grad, *(p.grad for p in ens.parameters())])
        found[-1] += [b.float() for b in ens.buffers()]
    for a, b in zip(*found, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_parameter_that_no_member_uses_has_no_gradient() -> None:
    def fn() -> nn.Module:
        module = nn.Linear(4, 3)
        module.register_parameter("spare", nn.Parameter(torch.zeros(2)))
        return module

    ens = Ensemble.from_factory(fn, range(2), strategy="loop")
    ens.loss(F.cross_entropy, torch.randn(6, 4), torch.randint(0, 3, (6,))).sum().backward()
    assert ens.stacked.spare.grad is None
    assert ens.stacked.weight.grad is not None


def test_second_derivatives_are_refused() -> None:
    ens = next(iter(both()))
    loss = ens.loss(F.cross_entropy, torch.randn(6, 4), torch.randint(0, 3, (6,))).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, list(ens.parameters()), create_graph=True)


def test_without_gradients_nothing_is_differentiated() -> None:
    ens = next(iter(both()))
    with torch.no_grad():
        losses = ens.loss(F.cross_entropy, torch.randn(6, 4), torch.randint(0, 3, (6,)))
    assert not losses.requires_grad


@pytest.mark.parametrize("members", [2, 3])
def test_gradients_become_those_of_the_parameters_without_a_copy(members: int) -> None:
    ens = Ensemble.from_factory(lambda: nn.Linear(4, 3), range(members), strategy="loop")
    losses = ens.loss(F.cross_entropy, torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    ready = {grad.data_ptr() for grad in losses.grad_fn.grads}
    losses.sum().backward()
    assert {p.grad.data_ptr() for p in ens.parameters()} == ready
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        losses.sum().backward()


def test_a_retained_graph_gives_the_gradients_again() -> None:
    ens = Ensemble.from_factory(lambda: nn.Linear(4, 3), range(2), strategy="loop")
    losses = ens.loss(F.cross_entropy, torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    losses.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in ens.parameters()]
    losses.sum().backward()
    for p, grad in zip(ens.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


class _Routed(nn.Module):
    """Takes one of two layers, by the sign of a weight, and then a third twice."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.left, self.right, self.twice = (nn.Linear(size, size) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.left(x) if self.gate > 0 else self.right(x)
        return self.twice(self.twice(h).tanh())


@pytest.mark.parametrize("size", [4, 600])
@pytest.mark.parametrize("right", [(0,), (1, 2), (2,), (0, 1, 2)])
def test_a_parameter_that_some_members_do_not_use_has_zeros_there(right: tuple[int, ...], size: int) -> None:
    modules = [_Routed(size) for _ in range(3)]
    for k in right:
        modules[k].gate.data.neg_()
    ens = Ensemble.from_modules(modules, strategy="loop")
    x, y = torch.randn(5, size), torch.zeros(5, dtype=torch.int64)
    ens.loss(F.cross_entropy, x, y).sum().backward()
    for module in modules:
        F.cross_entropy(module(x), y).backward()
    for name, p in ens.stacked.named_parameters():
        alone = [module.get_parameter(name).grad for module in modules]
        if all(grad is None for grad in alone):
            assert p.grad is None
            continue
        for k, grad in enumerate(alone):
            torch.testing.assert_close(p.grad[k], torch.zeros_like(p[k]) if grad is None else grad)


class _Halved(nn.Module):
    """Registers a hook on its weight in every forward pass."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            self.weight.register_hook(lambda grad: (grad / 2).t())
        return x @ self.weight


@pytest.mark.parametrize("size", [4, 600])
def test_what_a_hook_of_the_forward_pass_makes_of_a_gradient_counts(size: int) -> None:
    ens = Ensemble.from_factory(lambda: _Halved(size), range(2), strategy="loop")
    x, y = torch.randn(5, size), torch.zeros(5, dtype=torch.int64)
    ens.loss(F.cross_entropy, x, y).sum().backward()
    for k, grad in enumerate(ens.stacked.weight.grad):
        weight = ens.member(k).weight.detach().requires_grad_()
        (plain,) = torch.autograd.grad(F.cross_entropy(x @ weight, y), weight)
        torch.testing.assert_close(grad, plain.t() / 2)


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(600, 500, bias=False), nn.Tanh(), nn.Linear(500, 3))


def _gradients(ens: Ensemble, x: Tensor, y: Tensor) -> list[Tensor]:
    """Each member's, alone."""
    found = []
    for k in range(ens.members):
        member = ens.member(k)
        F.cross_entropy(member(x), y).backward()
        found.append(next(member.parameters()).grad)
    return found


def _held(how: str, grad: Tensor) -> object:
    kinds = {"gradient": grad, "view": grad[1], "numpy": grad.numpy(), "detached": grad.detach(), "no": None}
    return kinds[how]


@pytest.mark.parametrize("how", ["gradient", "view", "numpy", "detached", "no"])
def test_memory_of_large_gradients_is_used_again_when_nobody_holds_it(how: str) -> None:
    ens = Ensemble.from_factory(large, range(2), strategy="loop")
    weight = ens.stacked[0].weight
    x, y = torch.randn(2, 5, 600), torch.randint(0, 3, (2, 5))
    ens.loss(F.cross_entropy, x[0], y[0]).sum().backward()
    assert weight.grad.nbytes >= 2**20
    where, held = weight.grad.data_ptr(), _held(how, weight.grad)
    before = copy.deepcopy(held)
    ens.zero_grad()
    ens.loss(F.cross_entropy, x[1], y[1]).sum().backward()
    assert (weight.grad.data_ptr() == where) == (how == "no")
    for grad, expected in zip(weight.grad, _gradients(ens, x[1], y[1]), strict=True):
        torch.testing.assert_close(grad, expected)
    if how != "no":
        assert bool((held == before).all())


def test_large_gradients_of_several_losses_add_up() -> None:
    ens = Ensemble.from_factory(large, range(2), strategy="loop")
    weight = ens.stacked[0].weight
    x, y = torch.randn(4, 5, 600), torch.randint(0, 3, (4, 5))
    total = sum(torch.stack(_gradients(ens, x[i], y[i])) for i in range(4))
    ens.loss(F.cross_entropy, x[0], y[0]).sum().backward()
    first, second = (ens.loss(F.cross_entropy, x[i], y[i]) for i in (1, 2))  # both graphs before either
    second.sum().backward()
    first.sum().backward()
    ens.loss(F.cross_entropy, x[3], y[3]).sum().backward()
    torch.testing.assert_close(weight.grad, total)
    ens.zero_grad(set_to_none=False)
    for i in range(4):
        ens.loss(F.cross_entropy, x[i], y[i]).sum().backward()
    torch.testing.assert_close(weight.grad, total)


def test_a_loss_that_is_never_run_backward_gives_its_memory_back() -> None:
    ens = Ensemble.from_factory(large, range(2), strategy="loop")
    x, y = torch.randn(5, 600), torch.randint(0, 3, (5,))
    pending = ens.loss(F.cross_entropy, x, y)
    where = max(pending.grad_fn.grads, key=Tensor.numel).data_ptr()
    kept = ens.loss(F.cross_entropy, x, y)
    assert max(kept.grad_fn.grads, key=Tensor.numel).data_ptr() != where
    kept.sum().backward()
    pending.sum().backward()
    torch.testing.assert_close(
        ens.stacked[0].weight.grad, 2 * torch.stack(_gradients(ens, x, y)), rtol=1e-5, atol=1e-7
    )


def test_large_weights_are_not_folded_and_the_plan_says_so() -> None:
    ens = Ensemble.from_factory(lambda: nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600)), range(2))
    ens(torch.randn(5, 600))
    assert "360,600 parameters a step and member" in str(ens.plan(torch.randn(5, 600)))
    folded = Ensemble.from_factory(lambda: nn.Linear(600, 600), range(2), strategy="folded")
    assert folded.plan(torch.randn(5, 600)).refusal is None


class _Island(nn.Module):
    """Its head is in float32 whatever autocast says."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(h.float())


def test_gradients_under_autocast_are_those_of_a_backward_pass_outside_of_it() -> None:
    ens = Ensemble.from_factory(_Island, range(2), strategy="loop")
    x, y = torch.randn(6, 8), torch.randint(3, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = ens.loss(F.cross_entropy, x, y)
    losses.sum().backward()
    for k in range(2):
        member = ens.member(k)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(member(x), y)
        loss.backward()
        for stacked, alone in zip(ens.parameters(), member.parameters(), strict=True):
            assert torch.equal(stacked.grad[k], alone.grad)
