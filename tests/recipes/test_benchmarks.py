"""What benchmarks need, and say before anything is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psgrad import ConfigError
from recipes import bench_conv, bench_ensemble, bench_step, models_table

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


@pytest.mark.parametrize("recipe", [bench_conv, bench_ensemble, bench_step])
def test_a_device_that_is_not_there_is_refused(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        recipe.main(["--device", "cuda"])


@pytest.mark.parametrize("recipe", [bench_conv, bench_ensemble, bench_step, models_table])
def test_a_folder_that_cannot_be_written_to_is_refused(recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"nothing can be written to .*file"):
        recipe.main(["--out", str(tmp_path / "file" / "table")])
