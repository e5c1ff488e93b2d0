"""Backward refuses a loss that mixes samples, on a handle's first batch, and leaves no trace of a look."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import ConfigError, GradNorms, PerSampleGrads, clip_per_sample
from psgrad.ensemble import Ensemble
from psgrad.loss.check import BATCHES, LossCheck

N, C = 12, 4
CLASSES, VALUES = torch.arange(N) % C, torch.rand(N, C)
each = partial(F.cross_entropy, target=CLASSES, reduction="none")


def info_nce(z):
    similar = F.normalize(z) @ F.normalize(z).T / 0.1
    return F.cross_entropy(similar.masked_fill(torch.eye(N).bool(), -1e9), torch.arange(N).roll(N // 2))


MIXING = {
    "InfoNCE": info_nce,
    "triplet": lambda z: F.triplet_margin_loss(z, VALUES, z.roll(1, 0), margin=10.0),
    "neighbours": lambda z: (z[::2] - z[1::2]).square().mean(),
    "softmax weights": lambda z: (each(z) * each(z).softmax(0)).sum(),
    "centred": lambda z: (z - z.mean(0)).square().mean(),
    "spread": lambda z: F.mse_loss(z, VALUES) + F.relu(1 - z.std(0)).mean(),
    "batch norm": lambda z: F.mse_loss(F.batch_norm(z, None, None, training=True), VALUES),
    "RMSE": lambda z: F.mse_loss(z, VALUES).sqrt(),
    "perplexity": lambda z: F.cross_entropy(z, CLASSES).exp(),
    "in place": lambda z: F.mse_loss(z.clone().sub_(z.mean(0)), VALUES),
    "dice": lambda z: 1 - 2 * (z.sigmoid() * VALUES).sum() / (z.sigmoid() + VALUES).sum(),
}

APART = {
    "label smoothing": lambda z: F.cross_entropy(z, CLASSES, label_smoothing=0.1),
    "BCE": lambda z: F.binary_cross_entropy_with_logits(z, VALUES),
    "BCE of probabilities": lambda z: F.binary_cross_entropy(z.sigmoid(), VALUES),
    "MSE": lambda z: F.mse_loss(z, VALUES),
    "Huber": lambda z: F.huber_loss(z, VALUES),
    "KL divergence": lambda z: F.kl_div(z.log_softmax(1), VALUES.softmax(1), reduction="batchmean"),
    "NLL": lambda z: F.nll_loss(z.log_softmax(1), CLASSES),
    "Gaussian NLL": lambda z: F.gaussian_nll_loss(z[:, 0], VALUES[:, 0], z[:, 1].exp()),
    "focal": lambda z: ((1 - z.softmax(1)[range(N), CLASSES]) ** 2 * each(z)).mean(),
    "two losses": lambda z: F.cross_entropy(z, CLASSES) + 0.4 * F.mse_loss(z, VALUES),
    "weights": lambda z: (torch.arange(N) * each(z)).mean(),
    "weights of the batch, without gradients": lambda z: (each(z) * each(z.detach()).softmax(0)).sum() / N,
    "a penalty on outputs": lambda z: F.cross_entropy(z, CLASSES) + z.norm(dim=1).mean(),
    "its own row of a product": lambda z: F.mse_loss((z @ z.T).diag(), VALUES[:, 0]),
    "in place": lambda z: F.mse_loss(z.clone().mul_(2), VALUES),
    "sample after sample": lambda z: sum(F.cross_entropy(z[i], CLASSES[i]) for i in range(N)) / N,
}

UNTOLD = {
    "L1": lambda z: F.l1_loss(z, VALUES),
    "hinge": lambda z: F.multi_margin_loss(z, CLASSES),
    "CTC": lambda z: F.ctc_loss(
        z[None].log_softmax(2).expand(3, N, C),
        CLASSES[:, None] % 3 + 1,
        torch.full((N,), 3),
        torch.ones(N).long(),
    ),
    "not finite": lambda z: (each(z) * torch.inf).mean(),
}
"""Losses that are not differentiated twice, or show nothing when they are."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C)), torch.randn(N, 5)


clip = partial(clip_per_sample, max_norm=0.1)


def step(loss, attach=clip, dtype=torch.float32):
    model, x = network()
    with attach(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            value = loss(model(x))
        value.backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture
def unchecked(monkeypatch):
    """Call to have handles not look."""
    return lambda: monkeypatch.setattr(LossCheck, "judge_mixing", lambda self, mixes: None)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_refused(name):
    with pytest.raises(ConfigError, match="loss mixes samples"):
        step(MIXING[name])
    with pytest.raises(ConfigError, match="loss mixes samples"):
        step(MIXING[name], partial(clip, memory_budget=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", {**APART, **UNTOLD})
def test_what_keeps_samples_apart_passes_bit_for_bit(name, dtype, unchecked):
    loss = {**APART, **UNTOLD}[name]
    state = torch.get_rng_state()
    looked = step(loss, dtype=dtype)
    drawn = torch.rand(1)
    unchecked()
    torch.set_rng_state(state)
    plain = step(loss, dtype=dtype)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(looked, plain, strict=True))
    assert torch.equal(drawn, torch.rand(1))


def test_reduction_sum_with_ignored_targets_and_sequences():
    torch.manual_seed(0)
    model, x = nn.Linear(5, C), torch.randn(3, 7, 5)
    targets = torch.randint(C, (3, 7))
    with clip_per_sample(model, 1.0, "mean"):
        F.cross_entropy(model(x).transpose(1, 2), targets).backward()
    targets[0, 3:] = -100
    with clip_per_sample(model, 1.0, "sum"):
        F.cross_entropy(model(x).flatten(0, 1), targets.flatten(), reduction="sum").backward()


@pytest.mark.parametrize("attach", [GradNorms, PerSampleGrads])
def test_who_only_looks_is_warned_once(attach):
    model, x = network()
    with attach(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            MIXING["centred"](model(x)).backward()
    assert sum("loss mixes samples" in str(w.message) for w in caught) == 1


def test_several_outputs_and_several_models():
    (model, x), other = network(), nn.Linear(5, C)
    with clip(model), clip(other):
        (model(x) - other(x)).square().mean().backward()  # row by row
    with clip(model):
        (model(x) - model(x + 1)).square().mean().backward()
    with clip(model):
        loss = F.cross_entropy(model(x) @ model(x + 1).T, torch.arange(N))
        with pytest.raises(ConfigError, match="loss mixes samples"):
            loss.backward()
    with clip(model), clip(other):  # linear in each: only across the two
        loss = (model(x) @ other(x).T).mean()
        with pytest.raises(ConfigError, match="loss mixes samples"):
            loss.backward()


def test_rows_of_one_sample_may_meet():
    def among(z):
        z = z.unflatten(0, (-1, 2))
        return (z - z.mean(1, keepdim=True)).square().mean()

    step(among, partial(clip, rows_per_sample=2))
    with pytest.raises(ConfigError, match="loss mixes samples"):
        step(lambda z: among(z.roll(1, 0)), partial(clip, rows_per_sample=2))


def test_members_of_an_ensemble():
    ensemble = Ensemble.from_factory(lambda: nn.Linear(5, C), seeds=range(3))
    with clip_per_sample(ensemble, 1.0):
        ensemble.loss(F.cross_entropy, torch.randn(N, 5), CLASSES).sum().backward()
    with clip_per_sample(ensemble, 1.0), pytest.raises(ConfigError, match="loss mixes samples"):
        ensemble.loss(
            lambda z, _: (z - z.mean(0)).square().mean(), torch.randn(N, 5), CLASSES
        ).sum().backward()


def test_no_hook_runs_twice_and_no_gradient_is_written():
    model, x = network()
    ran = []
    model.register_full_backward_hook(lambda *_: ran.append("module"))
    with clip(model):
        z = model(x)
        p = z.softmax(1)
        p.retain_grad()
        p.register_hook(lambda g: ran.append("tensor"))
        p.grad_fn.register_hook(lambda *_: ran.append("node"))
        loss = F.mse_loss(p, VALUES)
        loss.backward()
    (expected,) = torch.autograd.grad(F.mse_loss(q := p.detach().requires_grad_(), VALUES), q)
    assert torch.equal(p.grad, expected)
    assert sorted(ran) == ["module", "node", "tensor"]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()  # the graph went with the first


def test_a_function_of_ones_own_is_not_called_more_often():
    class Twice(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, z):
            return z * 2

        @staticmethod
        def backward(ctx, g):
            Twice.calls += 1
            return g * 2

    step(lambda z: Twice.apply(z).square().mean())
    assert Twice.calls == 1
    step(lambda z: F.cross_entropy(checkpoint(torch.tanh, z, use_reentrant=False), CLASSES))


def test_the_first_batches_are_looked_at_until_one_tells(monkeypatch):
    looks = []
    told = LossCheck.judge_mixing
    monkeypatch.setattr(
        LossCheck, "judge_mixing", lambda self, mixes: (looks.append(mixes), told(self, mixes))
    )
    for loss, rows, expected in (
        (lambda z: z.square().mean(), N, [False]),
        (lambda z: z.abs().mean(), N, [None] * BATCHES),
        (lambda z: z.square().mean(), 1, []),
    ):
        model, x = network()
        looks.clear()
        with clip(model):
            for _ in range(5):
                loss(model(x[:rows])).backward()
        assert looks == expected
