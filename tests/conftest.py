"""Hypothesis profile and seed of all tests, skip of those that need CUDA, Triton's interpreter without it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the kernels run on the CPU

settings.register_profile("psgrad", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("psgrad")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests measure out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def unwatched() -> None:
    """Handles that tests before left attached look at backward passes no more."""
    from psgrad.loss import starts  # after TRITON_INTERPRET is set

    starts._watching.clear()
    starts._leading.clear()
    starts._restore_if_unwatched()


def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
