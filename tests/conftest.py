"""The Hypothesis profile of all tests, the skip of those that need CUDA, Triton's interpreter without it."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the kernels run on the CPU

settings.register_profile("psgrad", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("psgrad")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
