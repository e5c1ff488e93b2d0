"""The kernels compile for GPUs that are not here: Triton and its assembler need none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may have, by compute capability (from the CUDA programming guide)."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch on Linux alone"
)


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_every_tile_fits_an_a100_and_an_h100(which: str, tmp_path: Path) -> None:
    """quick: every tile once, precisions, layouts and epilogues in turn; all: each precision and layout."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.conv.triton_compiled", which]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    kernels = [json.loads(line) for line in lines.splitlines()]
    assert {kernel["architecture"] for kernel in kernels} == set(SHARED)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[kernel["architecture"]], kernel
        exact = (kernel["dtype"], kernel["precision"]) == ("float32", "ieee")
        # bytes a thread that registers spill to; exact float32 keeps its operands in registers
        assert kernel["stack"] <= (1024 if exact and kernel["architecture"] == 80 else 64), kernel
        exact = exact or kernel["layer"] == "depthwise"
        assert (kernel["tensor_cores"] == 0) == exact, kernel
        if not kernel["store"]:
            assert kernel["stores"] == 1, kernel  # one number a program, and no gradient
