"""What recipes need beyond psgrad's own dependencies, and say where it is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import runpy, sys
sys.modules["backpack"] = sys.modules["tabulate"] = None  # as Python marks what cannot be imported
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["bench_conv", "bench_step", "bench_ensemble", "models_table"])
def test_without_the_bench_extra_there_is_one_line_that_says_so(name: str) -> None:
    command = [sys.executable, "-c", WITHOUT, f"recipes.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr == 'error: the benchmarks need backpack and tabulate: pip install "psgrad[bench]"\n'
