"""Arguments by name reach every member as they would reach it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import psgrad
from psgrad import MemberError, ShapeError
from psgrad.ensemble import Ensemble

pytestmark = pytest.mark.usefixtures("double")
K = 3


class Masked(nn.Module):
    """Takes what a transformer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, *, scale: Any = 1.0
    ) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h if mask is None else h * mask
        return self.head(h if bias is None else h + bias) * scale


def values(own: bool, names: str) -> dict[str, Any]:
    front = (K, 5) if own else (5,)
    every = {
        "x": torch.randn(*front, 4),
        "mask": (torch.rand(*front, 6) > 0.5).double(),
        "bias": torch.randn(*front, 6),
        "scale": 2.0,
    }
    return {name: every[name] for name in names.split()}


def of(values: dict[str, Any], k: int, own: bool) -> dict[str, Any]:
    return {name: value[k] if own and isinstance(value, Tensor) else value for name, value in values.items()}


NAMES = ["x", "x mask", "mask x", "x bias", "x scale", "bias scale mask x"]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("strategy", ["folded", "loop"])
@pytest.mark.parametrize("members", [1, K])
def test_outputs_and_losses_are_those_of_every_member(
    names: str, own: bool, strategy: Any, members: int
) -> None:
    ens = Ensemble.from_factory(Masked, range(members), strategy=strategy)
    named, y = values(own, names), torch.randint(0, 3, (K, 5) if own else (5,))
    if own:
        named, y = {n: v[:members] if isinstance(v, Tensor) else v for n, v in named.items()}, y[:members]
    alone = [ens.member(k) for k in range(members)]
    expected = torch.stack([alone[k](**of(named, k, own)) for k in range(members)])
    torch.testing.assert_close(ens(**named, own=own), expected)
    torch.testing.assert_close(ens.predict(**named, own=own, link="identity").members, expected)
    if own:
        torch.testing.assert_close(ens.own(**named), expected)
    x = named.pop("x")
    for _ in range(2):
        ens.zero_grad()
        ens.loss(F.cross_entropy, x, y, own=own, **named).sum().backward()
    for k, member in enumerate(alone):
        mine = of({"x": x, **named}, k, own)
        F.cross_entropy(member(**mine), y[k] if own else y).backward()
        for p, q in zip(ens.parameters(), member.parameters(), strict=True):
            torch.testing.assert_close(p.grad[k], q.grad)


def test_what_could_stand_by_position_folds() -> None:
    ens = Ensemble.from_factory(Masked, range(K), strategy="folded")
    assert ens.plan(**values(False, "mask x")).refusal is None
    assert "bias" in str(ens.plan(**values(False, "x bias")).refusal)
    assert "scale" in str(ens.plan(**values(False, "x scale")).refusal)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("own", [False, True])
def test_members_are_clipped_as_alone(names: str, own: bool) -> None:
    ens = Ensemble.from_factory(Masked, range(K), strategy="folded")
    named, y = values(own, names), torch.randint(0, 3, (K, 5) if own else (5,))
    x = named.pop("x")
    with psgrad.clip_per_sample(ens, max_norm=0.5):
        ens.loss(F.cross_entropy, x, y, own=own, **named).sum().backward()
    for k in range(K):
        member = ens.member(k)
        with psgrad.clip_per_sample(member, max_norm=0.5):
            F.cross_entropy(member(**of({"x": x, **named}, k, own)), y[k] if own else y).backward()
        for p, q in zip(ens.parameters(), member.parameters(), strict=True):
            torch.testing.assert_close(p.grad[k], q.grad)


def test_what_forward_does_not_take_is_refused() -> None:
    ens = Ensemble.from_factory(Masked, range(K))
    with pytest.raises(TypeError, match="onw"):
        ens(torch.randn(5, 4), onw=True)
    with pytest.raises(ShapeError, match="K = 3"):
        ens(torch.randn(K, 5, 4), mask=torch.ones(5, 6), own=True)


def test_an_argument_by_name_changed_in_place_is_refused() -> None:
    class Divides(Masked):
        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            return super().forward(x, mask.div_(2))

    ens = Ensemble.from_factory(Divides, range(K))
    with pytest.raises(MemberError, match="clone"):
        ens(torch.randn(5, 4), mask=torch.ones(5, 6))
