"""Members one after the other: gradients taken at once are those of an ordinary backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.ensemble import Ensemble


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


def both() -> tuple[Ensemble, Ensemble]:
    return (Ensemble.from_factory(small, range(3), strategy=how) for how in ("loop", "folded"))  # type: ignore


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
