"""What members hold besides parameters and buffers is compared, however it is held."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from psgrad import MemberError
from psgrad.ensemble import Ensemble


class Settings:
    """Has no `__eq__`."""

    def __init__(self, scale: float) -> None:
        self.scale, self.me = scale, self


class Slotted:
    """Has no `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


def closure(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z * scale


def default(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda z, by=scale: z * by


def scaled(z: Tensor, by: float) -> Tensor:
    return z * by


KINDS: dict[str, Callable[[float], Any]] = {
    "modules": lambda v: [_filled(v)],
    "array": lambda v: torch.full((3,), v).numpy(),
    "closure": closure,
    "default": default,
    "partial": lambda v: functools.partial(scaled, by=v),
    "object": Settings,
    "slots": Slotted,
    "deep": lambda v: {"a": (Settings(v), [closure(v)])},
    "set": lambda v: {v, 1.0},
}


def _filled(value: float) -> nn.Module:
    module = nn.Linear(3, 3)
    nn.init.constant_(module.weight, value)
    nn.init.zeros_(module.bias)
    return module


def member(held: Any) -> nn.Module:
    module = nn.Linear(4, 3)
    module.held = held
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_what_differs_is_refused_and_what_is_alike_accepted(kind: str) -> None:
    make = KINDS[kind]
    Ensemble.from_factory(lambda: member(make(2.0)), range(3))
    with pytest.raises(MemberError, match="members 0 and 2 differ in the setting of held"):
        Ensemble.from_modules([member(make(v)) for v in (2.0, 2.0, 5.0)])


class Aliased(nn.Module):
    """Holds its own layer in a list, a method and a partial: copies follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.layers = [self.linear]
        self.method = self.double
        self.part = functools.partial(torch.mul, self.linear.bias)

    def double(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.method(self.layers[0](x)))


def test_members_that_hold_their_own_layers_are_accepted() -> None:
    ens = Ensemble.from_factory(Aliased, range(2), strategy="loop")
    x = torch.randn(5, 4)
    assert ens.member(1)(x).shape == (5, 3)


class Bound(nn.Module):
    """A function that holds the member, which a copy of the member does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.f = lambda x: self.linear(x)


def test_functions_that_hold_their_member_are_refused() -> None:
    with pytest.raises(MemberError, match="the setting of f"):
        Ensemble.from_factory(Bound, range(2))


@pytest.mark.parametrize(
    "by_hook",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", amount=0.5)],
)
def test_weights_computed_by_hooks_are_refused_with_what_to_use(by_hook: Any) -> None:
    with pytest.raises(MemberError, match=r"0\.weight of member 0 .*parametrizations"):
        Ensemble.from_factory(lambda: nn.Sequential(by_hook(nn.Linear(4, 3))), range(2))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_with_what_to_do(kind: Any) -> None:
    with pytest.raises(MemberError, match=r"0 of member 0 has sparse gradients.*sparse=False"):
        Ensemble.from_factory(lambda: nn.Sequential(kind(4, 3, sparse=True)), range(2))
