"""Privately trained ensembles: the noise hides a sample in all members' weights together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import psgrad.ensemble
from psgrad import ConfigError, clip_per_sample
from psgrad.dp import PrivacyEngine, PrivateOptimizer, PRVAccountant, noise_generator
from psgrad.ensemble import Ensemble

K, C, SIGMA, EXPECTED = 4, 0.5, 1.5, 8.0


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    )


def data(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 5, generator=draw), torch.randint(3, (count,), generator=draw)


def private(ens: Ensemble, sigma: float, seed: int = 0) -> PrivateOptimizer:
    return PrivateOptimizer(
        psgrad.ensemble.SGD(ens.parameters(), lr=1.0),
        clip_per_sample(ens, C, "sum"),
        noise_multiplier=sigma,
        expected_batch_size=EXPECTED,
        accountant=PRVAccountant(),
        sample_rate=0.1,
        generator=noise_generator(seed=seed),
    )


def summed(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="sum")


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_a_step_without_noise_is_every_members_own_private_step(strategy: str) -> None:
    torch.manual_seed(0)
    ens = Ensemble.from_factory(network, range(K), strategy=strategy)
    alone = [ens.member(k) for k in range(K)]
    x, y = data(6)
    optimizer = private(ens, 0.0)
    for _ in range(3):
        ens.loss(summed, x, y).sum().backward()
        optimizer.step()
    for k, member in enumerate(alone):
        own = PrivateOptimizer(
            torch.optim.SGD(member.parameters(), lr=1.0),
            clip_per_sample(member, C, "sum"),
            noise_multiplier=0.0,
            expected_batch_size=EXPECTED,
            accountant=PRVAccountant(),
            sample_rate=0.1,
        )
        for _ in range(3):
            summed(member(x), y).backward()
            own.step()
        for p, q in zip(ens.member(k).parameters(), member.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_every_member_gets_noise_of_its_own_scaled_to_the_bound_of_all() -> None:
    ens = Ensemble.from_factory(lambda: nn.Linear(500, 500, bias=False), range(K))
    before = ens.stacked.weight.detach().clone()
    optimizer = private(ens, SIGMA)
    optimizer.step_empty()
    noise = (before - ens.stacked.weight.detach()).flatten(1).double()
    expected = SIGMA * K**0.5 * C / EXPECTED
    # the standard deviation of 250,000 draws, within 1e-6 on either side: 5 / sqrt(2 n)
    assert ((noise.std(1) / expected - 1).abs() < 5 / (2 * 250_000) ** 0.5).all()
    between = torch.corrcoef(noise) - torch.eye(K, dtype=torch.float64)
    assert between.abs().max() < 5 / 250_000**0.5
    assert len(optimizer.accountant.history) == 1
    assert optimizer.accountant.history[0][0] == SIGMA


def test_one_sample_moves_all_members_together_by_the_bound_at_most() -> None:
    x, y = data(6)
    moved = []
    for kept in (6, 5):
        ens = Ensemble.from_factory(network, range(K))
        start = [p.detach().clone() for p in ens.parameters()]
        optimizer = private(ens, 0.0)
        ens.loss(summed, x[:kept] * 100, y[:kept]).sum().backward()
        optimizer.step()
        moved.append([p.detach() - q for p, q in zip(ens.parameters(), start, strict=True)])
        assert optimizer.clip.l2_bound == pytest.approx(C * K**0.5)
    change = sum((p - q).double().square().sum() for p, q in zip(*moved, strict=True)) ** 0.5 * EXPECTED
    assert 0.9 * C * K**0.5 < change <= C * K**0.5 * (1 + 1e-5)


def test_the_engine_trains_an_ensemble_and_tells_the_epsilon_of_all_members() -> None:
    epsilons = []
    for module in (Ensemble.from_factory(network, range(K)), network()):
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(
                TensorDataset(*data(32)), batch_size=8, generator=torch.Generator().manual_seed(2)
            ),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
        )
        for x, y in loader:
            optimizer.zero_grad()
            losses = (
                model.loss(F.cross_entropy, x, y).sum()
                if module is model and isinstance(model, Ensemble)
                else F.cross_entropy(model(x), y)
            )
            losses.backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in module.parameters())
        epsilons.append(engine.get_epsilon(1e-5))
    assert epsilons[0] == epsilons[1]


def test_the_engine_refuses_batches_that_no_accountant_describes() -> None:
    ens = Ensemble.from_factory(network, range(K))
    with pytest.raises(ConfigError, match="MemberLoader is no"):
        PrivacyEngine().make_private(
            module=ens,
            optimizer=torch.optim.SGD(ens.parameters(), lr=0.1),
            data_loader=psgrad.ensemble.MemberLoader(TensorDataset(*data(32)), 8, range(K), bootstrap=True),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
        )


def test_the_engine_does_not_replace_layers_of_stacked_parameters() -> None:
    ens = Ensemble.from_factory(lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), range(K))
    assert not PrivacyEngine.is_compatible(module=ens)
    with pytest.raises(ConfigError, match="from_factory"):
        PrivacyEngine.get_compatible_module(ens)
    fixed = Ensemble.from_modules([PrivacyEngine.get_compatible_module(ens.member(k)) for k in range(K)])
    assert PrivacyEngine.is_compatible(module=fixed)
