"""A loss function runs once for all members only where it is known to leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.ensemble import Ensemble
from psgrad.ensemble.purity import leaves_nothing

K = 3
WEIGHT = torch.ones(3)
STORED: list[Any] = []
LAST = None
HOLDER = SimpleNamespace()
COUNT = torch.zeros(())


def focal(out: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    p = torch.softmax(out, -1).gather(1, y[:, None])
    loss = -((1 - p) ** gamma) * p.log()
    loss += 0 * out.abs().sum()
    return loss.mean()


def weighted(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, y: scale * F.cross_entropy(out, y, weight=WEIGHT)


PURE: list[Callable[..., Any]] = [
    F.mse_loss, nn.BCEWithLogitsLoss(), torch.sum, focal, weighted(2.0), partial(focal, gamma=1.0),
    partial(F.cross_entropy, reduction="sum"), lambda out, y: out[0].square().sum() / max(1, len(y)),
]  # fmt: skip  # one a line is a page


def appends(out: Tensor, y: Tensor) -> Tensor:
    STORED.append(out.detach())
    return F.cross_entropy(out, y)


def appends_to_targets(out: Tensor, y: Any) -> Tensor:
    y["log"].append(out.detach())
    return out.mean()


def sets(out: Tensor, _: Any) -> Tensor:
    global LAST
    LAST = out
    return out.mean()


def sets_attribute(out: Tensor, _: Any) -> Tensor:
    HOLDER.out = out
    return out.mean()


def counts(out: Tensor, _: Any) -> Tensor:
    COUNT.add_(1)
    return out.mean()


def nested(out: Tensor, _: Any) -> Tensor:
    return (lambda: out.mean())()


def default(out: Tensor, _: Any, log: Any = STORED) -> Tensor:
    return out.mean() if log else out.sum()


def calls(out: Tensor, y: Tensor) -> Tensor:
    return appends(out, y)


def imports(out: Tensor, _: Any) -> Tensor:
    import math

    return out.mean() * math.pi


def keeping() -> Callable[..., Any]:
    kept = None

    def fn(out: Tensor, _: Any) -> Tensor:
        nonlocal kept
        kept = out
        return kept.mean()

    return fn


class Own(nn.Module):
    """May store what it likes."""

    def forward(self, out: Tensor, _: Any) -> Tensor:
        return out.mean()


hooked = nn.MSELoss()
hooked.register_forward_hook(lambda *_: None)

UNKNOWN: list[Callable[..., Any]] = [
    appends, appends_to_targets, sets, sets_attribute, counts, nested, default, calls, imports, keeping(),
    Own(), hooked, Own().forward, nn.Sequential(Own()).forward, partial(focal, gamma=[1.0]), partial(appends),
    lambda out, _: print(out) or out.mean(),
]  # fmt: skip  # one a line is a page


@pytest.mark.parametrize("fn", PURE)
def test_what_leaves_nothing_is_known(fn: Any) -> None:
    assert leaves_nothing(fn)


@pytest.mark.parametrize("fn", UNKNOWN)
def test_what_may_leave_something_is_not(fn: Any) -> None:
    assert not leaves_nothing(fn)


def data() -> tuple[Ensemble, Tensor, Tensor]:
    ens = Ensemble.from_factory(lambda: nn.Linear(4, 3), range(K), strategy="folded")
    return ens, torch.randn(5, 4), torch.randint(0, 3, (5,))


def test_what_a_loss_function_stores_can_be_used() -> None:
    ens, x, y = data()
    STORED.clear()
    losses = ens.loss(appends, x, y)
    torch.testing.assert_close(torch.stack(STORED), ens(x))
    torch.testing.assert_close(losses, torch.stack([F.cross_entropy(out, y) for out in STORED]))


def test_what_a_loss_function_counts_is_counted_for_every_member() -> None:
    ens, x, y = data()
    COUNT.zero_()
    ens.loss(counts, x, y)
    assert COUNT == K


def test_a_pure_loss_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ens, x, y = data()
    under: list[Any] = []
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda *args, **kwargs: under.append(args) or vmap(*args, **kwargs))
    found = ens.loss(focal, x, y)
    assert under
    torch.testing.assert_close(found, torch.stack([focal(out, y) for out in ens(x)]))
