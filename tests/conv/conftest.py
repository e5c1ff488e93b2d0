"""Fixtures of the tests of the rules under `torch.func`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import psgrad.conv.rules.per_sample as per_sample
from tests.conv.functorch_models import (
    SHIPPED,
    kernels,
)


@pytest.fixture(autouse=True)
def _shipped_rules_are_back() -> Iterator[None]:
    assert kernels() == SHIPPED
    yield
    assert kernels() == SHIPPED


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The strategies that backward passes have asked for, in order."""
    names: list[str] = []
    original = per_sample.weight_grads

    def recording(*args):
        names.append(args[-1])
        return original(*args)

    monkeypatch.setattr(per_sample, "weight_grads", recording)
    return names
