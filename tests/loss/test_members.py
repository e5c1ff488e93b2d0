"""The losses of an ensemble's members are looked at where `Ensemble.loss` is given them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import ConfigError, clip_per_sample
from psgrad.ensemble import Ensemble
from psgrad.loss import judge_member_loss

K, N = 3, 6
LOSSES = {
    "mean": [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(z),
    ],
    "sum": [
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: len(z) * F.cross_entropy(z, y),
    ],
}
CASES = [(actual, loss, "folded") for actual, losses in LOSSES.items() for loss in losses]
CASES += [(actual, losses[0], "loop") for actual, losses in LOSSES.items()]


def made(strategy="auto"):
    def network():
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    return Ensemble.from_factory(network, range(K), strategy=strategy)


def data(own, rows=N):
    torch.manual_seed(0)
    shape = (K, rows) if own else (rows,)
    return torch.randn(*shape, 4), torch.randint(0, 3, shape)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("wanted", ["mean", "sum"])
@pytest.mark.parametrize(("actual", "loss", "strategy"), CASES)
def test_the_other_reduction_is_refused(actual, loss, strategy, wanted, own):
    ens = made(strategy)
    x, y = data(own)
    with clip_per_sample(ens, 1.0, wanted):
        if actual != wanted:
            with pytest.raises(ConfigError, match=f'is the {actual} over.*Give loss_reduction="{actual}"'):
                ens.loss(loss, x, y, own=own)
            loss = F.cross_entropy if wanted == "mean" else LOSSES["sum"][0]
        ens.loss(loss, x, y, own=own).sum().backward()
    ens.loss(loss, x, y, own=own)  # without a handle nothing is looked at


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.full((N,), 1 / N)).sum(),
        lambda z, y: F.cross_entropy(z, y) * 0,
        lambda z, y: F.cross_entropy(z, y) + z.square().sum(),
    ],
    ids=["for N rows only", "zero", "neither"],
)
@pytest.mark.parametrize("wanted", ["mean", "sum"])
def test_what_cannot_be_told_passes(loss, wanted):
    with clip_per_sample(ens := made(), 1.0, wanted):
        ens.loss(loss, *data(False)).sum().backward()


@pytest.mark.parametrize("actual", LOSSES)
@pytest.mark.parametrize("wanted", LOSSES)
def test_of_one_sample_mean_and_sum_are_the_same(wanted, actual):
    ens = made()
    x, y = data(own=False, rows=1)
    with clip_per_sample(ens, 1.0, wanted):
        for loss in LOSSES[actual][:2]:
            ens.loss(loss, x, y).sum().backward()


def test_each_loss_is_looked_at_once_and_leaves_the_random_numbers():
    calls = []

    def noisy(z, y):
        calls.append(len(z))
        return F.cross_entropy(z + 0 * torch.rand(()), y)

    x, y = data(False)
    with clip_per_sample(ens := made(), 1.0):
        out = ens(x)
        state = torch.get_rng_state()
        for _ in range(2):
            judge_member_loss(noisy, out, y, False)
        assert torch.equal(torch.get_rng_state(), state)
        assert calls == [N, 2 * N]
        ens.loss(F.cross_entropy, x, y)
        with pytest.raises(ConfigError, match="is the sum"):
            ens.loss(LOSSES["sum"][1], x, y)
