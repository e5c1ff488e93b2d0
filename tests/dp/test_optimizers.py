"""Any `torch.optim` optimizer makes the step it makes with clipped gradients computed one by one."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.nn.utils import parametrize

from psgrad import CaptureError, ConfigError
from psgrad.dp import PrivacyEngine
from tests.dp.problems import backward, dataset, flat, loader_of, network, private

BOUND = 0.1
BATCHES = [dataset(16)[part : part + 5] for part in (0, 5, 10)]


def double(batch):
    return batch[0].double(), batch[1]


def one_by_one(model: nn.Module, optimizer: optim.Optimizer, steps: list, divisor: float) -> None:
    """DP-SGD without noise, from its definition."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for x, y in steps:
        total = [torch.zeros_like(p) for p in trained]
        for n in range(len(x)):
            own = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), trained)
            norm = torch.cat([g.flatten() for g in own]).norm().item()
            for t, g in zip(total, own, strict=True):
                t += g * min(1.0, BOUND / norm)
        for p, t in zip(trained, total, strict=True):
            p.grad = t / divisor
        optimizer.step()


def agree(model: nn.Module, make, **options) -> nn.Module:
    """Train by the engine and one by one; return the former's model."""
    other = copy.deepcopy(model)
    steps = [double(batch) for batch in BATCHES]
    engine = PrivacyEngine()
    _, optimizer, _ = engine.make_private(
        module=model,
        optimizer=make(model),
        data_loader=loader_of(),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        **options,
    )
    for x, y in steps:
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
    one_by_one(other, make(other), steps, divisor=4)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-9)
    assert engine.accountant.history == [(0.0, 0.25, 3)]
    return model


OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.5),
    "momentum": partial(optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(optim.SGD, lr=0.5, momentum=0.9, nesterov=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.1),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "Rprop": partial(optim.Rprop, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_an_optimizer_of_torch(kind):
    before = network().double()
    after = agree(network().double(), lambda model: kind(model.parameters()))
    assert (flat(after) - flat(before)).norm() > 1e-2


def test_parameter_groups_keep_their_settings():
    agree(
        network().double(),
        lambda model: optim.SGD(
            [
                {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.1},
                {"params": [model[1].weight, model[4].weight], "momentum": 0.9},
                {"params": [model[1].bias, model[4].bias], "lr": 0.0},
            ],
            lr=0.5,
        ),
    )


def test_what_the_optimizer_does_not_hold_is_clipped_with_the_rest_and_stays():
    model = network().double()
    before = model[0].weight.clone()
    agree(model, lambda model: optim.Adam(model[4].parameters(), lr=0.01))
    assert torch.equal(model[0].weight, before)


ADDED = {
    "iterator": (nn.Module.parameters, nn.Module.parameters),
    "named": (nn.Module.named_parameters, nn.Module.named_parameters),
    "list": (nn.Module.parameters, lambda layer: [*layer.parameters()]),
    "one": (nn.Module.parameters, lambda layer: layer.weight),
}


@pytest.mark.parametrize(("first", "added"), ADDED.values(), ids=list(ADDED))
def test_a_group_that_is_added_is_trained(first, added):
    model = network()
    model, optimizer, _ = private(model=model, optimizer=lambda _: optim.SGD(first(model[0])))
    optimizer.add_param_group({"params": added(model[4]), "lr": 0.5})
    before = model[4].weight.clone()
    backward(model, *BATCHES[0])
    optimizer.step()
    assert not torch.equal(model[4].weight, before)
    with pytest.raises(ConfigError, match="not clipped"):
        optimizer.add_param_group({"params": added(nn.Linear(3, 2))})
    assert len(optimizer.param_groups) == 2


def test_frozen_parts_stay_whatever_the_optimizer_holds():
    model = network().double()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    frozen = [p.clone() for p in (*model[0].parameters(), model[1].bias)]
    agree(model, lambda model: optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    assert all(map(torch.equal, frozen, (*model[0].parameters(), model[1].bias)))


def test_frozen_parts_get_no_noise():
    model = network()
    model[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model, optimizer, _ = private(model=model, optimizer=lambda _: optim.SGD(model.parameters(), lr=1.0))
    backward(model, *BATCHES[0])
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("0."), name


def test_freezing_or_thawing_under_the_engine_is_refused_by_name():
    for at_first in (True, False):
        model = network()
        model[0].requires_grad_(at_first)
        model, optimizer, _ = private(model=model, optimizer=lambda _, m=model: optim.SGD(m.parameters()))
        model[0].requires_grad_(not at_first)
        with pytest.raises(CaptureError, match=r"0\.weight"):
            backward(model, *BATCHES[0])
        with pytest.raises(ConfigError, match="without a clipped gradient"):
            optimizer.step()


class Adapter(nn.Module):
    """A frozen layer with a trained low-rank one beside it (LoRA)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class LowRank(nn.Module):
    """`W + U V` in place of W."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.up = nn.Parameter(torch.randn(rows, rank) * 0.1)
        self.down = nn.Parameter(torch.randn(rank, columns) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def with_adapter() -> nn.Module:
    model = network().requires_grad_(False)
    model[4] = Adapter(model[4], 2)
    return model.double()


def with_parametrization() -> nn.Module:
    model = network().requires_grad_(False)
    for layer in (model[0], model[4]):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, 2))
    return model.double()


@pytest.mark.parametrize("make", [with_adapter, with_parametrization])
def test_lora(make):
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    agree(model, lambda model: optim.AdamW(model.parameters(), lr=0.01))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        name
        for name in before
        if name.rpartition(".")[2] in ("up", "down") or ".up." in name or ".down." in name
    }
    assert len(moved) in (2, 4)


def test_lbfgs_is_refused_before_anything_is_spent():
    engine = PrivacyEngine()
    with pytest.raises(ConfigError, match="LBFGS computes the loss several times"):
        private(engine, optimizer=optim.LBFGS)
    assert engine.accountant.history == []


def test_half_precision_is_refused_before_anything_is_spent():
    """Of 1024 alike samples in bfloat16 one changed the clipped sum by 2.5 times its bound."""
    engine, model = PrivacyEngine(), network()
    model[0].bfloat16()
    with pytest.raises(ConfigError, match=r"'0.weight' \(.*half precision.*autocast"):
        private(engine, model=model)
    assert engine.accountant.history == []
    model[0].requires_grad_(False)
    private(engine, model=model)


def test_the_closure_of_another_optimizer_is_called_once():
    model, optimizer, _ = private()
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        backward(model, *BATCHES[0])
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert len(calls) == 1
    assert optimizer.accountant.history == [(1.0, 0.25, 1)]
