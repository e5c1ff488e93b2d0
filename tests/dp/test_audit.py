"""P8: an audit with Dirac canaries, which the right engine passes and every broken one must fail.

Canary i is an input that only weight i sees: its clipped gradient is C e_i. A coin decides whether it is in
the data. After T full-batch steps without sampling, weight i is -lr/divisor times N(T C b_i, T sigma^2 C^2):
the scores of those that were in and out differ by mu = sqrt(T) / sigma standard deviations, and no private
mechanism with less noise can show more. The lower bound is that of a Gaussian mechanism's (Dong et al. 2022).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psgrad import clip_per_sample
from psgrad.dp import PrivacyEngine, PrivateOptimizer, PRVAccountant

CANARIES, REPETITIONS, STEPS = 2000, 10, 4
SIGMA, BOUND, DELTA, ALPHA = 2.0, 1.0, 1e-5, 1e-6


def epsilon_of(mu: float) -> float:
    """Epsilon of mu-GDP at DELTA (Dong et al. 2022, corollary 1), by bisection."""
    cdf = NormalDist().cdf

    def delta(eps: float) -> float:
        return cdf(-eps / mu + mu / 2) - math.exp(eps) * cdf(-eps / mu - mu / 2)

    low, high = 0.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return low


def audited(inside: Tensor, scores: Tensor) -> float:
    """Lower bound on epsilon, with confidence 1 - ALPHA, from canaries' scores."""
    within, without = scores[inside], scores[~inside]
    spread = torch.cat([within - within.mean(), without - without.mean()]).std().item()
    distance = (within.mean() - without.mean()).item() / max(spread, 1e-12)
    error = math.sqrt(1 / len(within) + 1 / len(without) + distance**2 / (2 * len(scores)))
    return epsilon_of(min(60.0, max(1e-3, distance - NormalDist().inv_cdf(1 - ALPHA) * error)))


class Canaries(nn.Module):
    """A convolution whose window is its whole input: canary i has its gradient in weight i alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, CANARIES, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def by_engine(model: nn.Module, x: Tensor, noise: float, bound: float) -> None:
    loader = DataLoader(TensorDataset(x), batch_size=len(x))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=sgd,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=bound,
        loss_reduction="mean",
    )
    for _ in range(STEPS):
        for (batch,) in loader:  # a sample rate of 1: the whole data set
            (-model(batch)).mean().backward()
            optimizer.step()


def by_hand(model: nn.Module, x: Tensor, noise: float, bound: float) -> None:
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        clip_per_sample(model, bound, "sum"),
        noise_multiplier=noise,
        expected_batch_size=len(x),
        accountant=PRVAccountant(),
        sample_rate=1.0,
    )
    for _ in range(STEPS):
        for part in x.split(300):
            (-model(part)).sum().backward()
        optimizer.step()


def lower_bound(train, noise: float = SIGMA, bound: float = BOUND) -> float:
    insides, scores = [], []
    for repetition in range(REPETITIONS):
        coins = torch.Generator().manual_seed(repetition)
        inside = torch.rand(CANARIES, generator=coins) < 0.5
        x = 10 * torch.eye(CANARIES)[inside].unsqueeze(1)
        model = Canaries()
        train(model, x, noise, bound)
        insides.append(inside)
        scores.append(model.conv.weight.detach().flatten() * len(x))
    return audited(torch.cat(insides), torch.cat(scores))


CLAIM = epsilon_of(math.sqrt(STEPS) / SIGMA)


@pytest.mark.parametrize("train", [by_engine, by_hand])
def test_what_is_claimed_is_kept(train):
    bound = lower_bound(train)
    assert 0.8 * CLAIM < bound < CLAIM


@pytest.mark.parametrize("train", [by_engine, by_hand])
@pytest.mark.parametrize(
    ("broken", "noise", "bound"),
    [
        ("a fifth less noise", SIGMA / 1.2, BOUND),
        ("half the noise", SIGMA / 2, BOUND),
        ("hardly any noise", 1e-6, BOUND),
        ("not clipped", SIGMA * BOUND / 1e6, 1e6),  # the noise that a bound of 1 calls for
    ],
)
def test_a_broken_engine_is_caught(train, broken, noise, bound):
    assert lower_bound(train, noise, bound) > CLAIM
