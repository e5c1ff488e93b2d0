"""A hundred steps of an ensemble are those of each model alone, to 1e-10: model, optimizer and schedule.

Batches of 8 and smooth activations: rounding that a kink or a BatchNorm over few values amplifies grows over
a hundred steps, in the model alone as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from psgrad.ensemble import SGD, Adam, AdamW, Ensemble
from tests.ensemble.models import Tied, images, rows, tokens

K, N, STEPS = 3, 8, 100
RATES = [0.05, 0.02, 0.1]
Batches = list[tuple[Tensor, Tensor]]


def _batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )


def _group_norm() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 36, 3),
    )
    model[0].bias.requires_grad_(False)
    return model


def _dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 3), nn.Dropout(0.1)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "batch norm, depthwise": (_batch_norm, images),
    "group norm, transposed, frozen": (_group_norm, images),
    "layer norm, dropout": (_dropout, rows),
    "tied and frozen": (Tied, tokens),
}
OPTIMIZERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "SGD": (SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, torch.optim.Adam, {"weight_decay": 0.01}),
    "AdamW": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    yield
    torch.set_default_dtype(torch.float32)


def batches(make: Callable[[int], Tensor], own: bool, members: int = K) -> Batches:
    return [
        (
            torch.stack([make(N) for _ in range(members)]) if own else make(N),
            torch.randint(3, (members, N) if own else (N,)),
        )
        for _ in range(STEPS)
    ]


def fit(
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Any,
) -> None:
    for x, y in data:
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
        schedule.step()


def alone(fn: Callable[[], nn.Module], seed: int, kind: str, rate: float, data: Batches) -> dict[str, Tensor]:
    _, make, options = OPTIMIZERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fn()
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=rate, **options)
        schedule = CosineAnnealingLR(optimizer, STEPS, eta_min=1e-3)
        fit(optimizer, schedule, lambda x, y: F.cross_entropy(model(x), y), data)
    return model.state_dict()


def together(
    fn: Callable[[], nn.Module], seeds: list[int], kind: str, rates: Any, data: Any, own: bool
) -> Ensemble:
    make, _, options = OPTIMIZERS[kind]
    ens = Ensemble.from_factory(fn, seeds, strategy="folded")
    optimizer = make([p for p in ens.parameters() if p.requires_grad], lr=rates, **options)
    schedule = CosineAnnealingLR(optimizer, STEPS, eta_min=1e-3)
    fit(optimizer, schedule, lambda x, y: ens.loss(F.cross_entropy, x, y, own=own).sum(), data)
    return ens


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for path in expected:
        torch.testing.assert_close(
            found[path], expected[path], rtol=0, atol=1e-10, msg=lambda m, p=path: f"{p}: {m}"
        )


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_member_is_the_model_fitted_alone(name: str, kind: str, own: bool) -> None:
    fn, make = MODELS[name]
    data = batches(make, own)
    rates = [rate / (1 if kind == "SGD" else 10) for rate in RATES]
    ens = together(fn, [10, 11, 12], kind, rates, data, own)
    assert ens.plan(data[0][0], own=own).refusal is None
    for k in range(K):
        of_member = [(x[k], y[k]) if own else (x, y) for x, y in data]
        close(ens.member(k).state_dict(), alone(fn, 10 + k, kind, rates[k], of_member))


@pytest.mark.parametrize("name", MODELS)
def test_one_member_is_plain_pytorch(name: str) -> None:
    fn, make = MODELS[name]
    data = batches(make, False)
    close(together(fn, [3], "SGD", 0.05, data, False).member(0).state_dict(), alone(fn, 3, "SGD", 0.05, data))


def test_permuted_members_give_permuted_results() -> None:
    fn, make = MODELS["layer norm, dropout"]
    data, order = batches(make, True), [2, 0, 1]
    permuted = [(x[order], y[order]) for x, y in data]
    first = together(fn, [4, 5, 6], "AdamW", [0.01, 0.02, 0.03], data, True)
    second = together(fn, [6, 4, 5], "AdamW", [0.03, 0.01, 0.02], permuted, True)
    for at, k in enumerate(order):
        close(second.member(at).state_dict(), first.member(k).state_dict())


@pytest.mark.parametrize(
    "name", ["batch norm, depthwise", "group norm, transposed, frozen", "layer norm, dropout"]
)
def test_a_member_that_diverges_changes_nothing_in_another(name: str) -> None:
    fn, make = MODELS[name]
    data = batches(make, True)
    before = together(fn, [4, 5, 6], "Adam", [0.01] * K, data, True)
    for x, _ in data:
        x[1] = float("nan")
    after = together(fn, [4, 5, 6], "Adam", [0.01, 1e3, 0.01], data, True)
    assert not all(t.isfinite().all() for t in after.member(1).state_dict().values())
    for k in (0, 2):
        ours, theirs = after.member(k).state_dict(), before.member(k).state_dict()
        assert all(torch.equal(ours[path], theirs[path]) for path in theirs)
