"""A private discriminator, and a generator that learns through it: the ways in which scripts write that."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psgrad.dp import PrivacyEngine


def discriminator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), nn.Linear(36, 1), nn.Flatten(0)
    ).double()


def generator() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 25), nn.Tanh(), nn.Unflatten(1, (1, 5, 5))).double()


def wrong(scores: Tensor, real: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))


class TwoNetworks:
    """A GAN by hand: clipped sums from one backward a sample, `wrong` undone of its mean over the batch."""

    def __init__(self, max_norm: float, expected: float) -> None:
        self.d, self.g = discriminator(), generator()
        self.max_norm, self.expected = max_norm, expected
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (self.d, self.g)]

    def step(self, real: Tensor, noise: Tensor) -> None:
        clipped = [torch.zeros_like(p) for p in self.d.parameters()]
        fake = self.g(noise)
        for i in range(len(real)):
            loss = wrong(self.d(real[i : i + 1]), 1.0) + wrong(self.d(fake[i : i + 1].detach()), 0.0)
            grads = torch.autograd.grad(loss, list(self.d.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            factor = min(1.0, self.max_norm / float(norm))
            clipped = [total + factor * g for total, g in zip(clipped, grads, strict=True)]
        for p, total in zip(self.d.parameters(), clipped, strict=True):
            p.grad = total / self.expected
        self.optimizers[0].step()
        if len(real):
            self.optimizers[1].zero_grad()
            wrong(self.d(fake), 1.0).backward()
            self.optimizers[1].step()


@pytest.mark.parametrize("how", ["frozen", "optimizer.zero_grad", "module.zero_grad"])
def test_a_generator_trains_through_a_private_discriminator(how):
    """The generator's pass adds nothing to the discriminator's step, and is accounted as nothing."""
    d, g = discriminator(), generator()
    images = torch.randn(24, 1, 5, 5, dtype=torch.float64)
    loader = DataLoader(TensorDataset(images), batch_size=6, generator=torch.Generator().manual_seed(3))
    engine = PrivacyEngine()
    d, optimizer, loader = engine.make_private(
        module=d,
        optimizer=torch.optim.SGD(d.parameters(), lr=0.5),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.3,
    )
    of_generator = torch.optim.SGD(g.parameters(), lr=0.5)
    by_hand = TwoNetworks(0.3, 6)
    for (real,) in loader:
        noise = torch.randn(len(real), 3, dtype=torch.float64)
        (d if how == "module.zero_grad" else optimizer).zero_grad()
        fake = g(noise)
        (wrong(d(real), 1.0) + wrong(d(fake.detach()), 0.0)).backward()
        optimizer.step()
        if len(real):
            of_generator.zero_grad()
            for p in d.parameters():
                p.requires_grad_(how != "frozen")
            wrong(d(fake), 1.0).backward()
            of_generator.step()
            for p in d.parameters():
                p.requires_grad_(True)
        by_hand.step(real, noise)
        for ours, theirs in ((d, by_hand.d), (g, by_hand.g)):
            for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)
    assert engine.accountant.history == [(0.0, 0.25, 4)]


def test_a_step_taken_while_frozen_is_the_step_of_what_was_clipped():
    """`optimizer.step()` after the freezing: the noisy sum, and no more."""
    d = discriminator()
    frozen = copy.deepcopy(d)
    steps = []
    for model, freeze in ((d, False), (frozen, True)):
        engine = PrivacyEngine()
        model, optimizer, _ = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=DataLoader(TensorDataset(torch.randn(24, 1)), batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=0.3,
            poisson_sampling=False,
            noise_generator=torch.Generator().manual_seed(5),
        )
        wrong(model(torch.ones(6, 1, 5, 5, dtype=torch.float64)), 1.0).backward()
        model.requires_grad_(not freeze)
        if freeze:
            model(torch.ones(9, 1, 5, 5, dtype=torch.float64, requires_grad=True)).sum().backward()
        optimizer.step()
        assert engine.accountant.history == [(1.0, 0.25, 1)]
        steps.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
