"""What benchmarks need, and say before anything is measured."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from psgrad import ConfigError
from recipes import EXTRA, bench_conv, bench_ensemble, bench_step, models_table

WITHOUT = """
import runpy, sys
sys.argv = sys.argv[1:]
for package in sys.argv.pop().split(","):
    sys.modules[package] = None  # as Python marks what cannot be imported
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def without(*packages: str, command: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", WITHOUT, command, ",".join(packages)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", ["bench_conv", "bench_step", "bench_ensemble", "models_table"])
def test_without_the_bench_extra_there_is_one_line_that_says_so(name: str) -> None:
    done = without("backpack", "tabulate", command=f"recipes.{name}")
    assert done.returncode == 1
    assert done.stderr == 'error: the benchmarks need backpack and tabulate: pip install "psgrad[bench]"\n'


@pytest.mark.parametrize("name", ["train_dp", "train_ensemble", "clip_norms", "bench_step"])
def test_without_the_recipes_extra_there_is_one_line_that_says_so(name: str) -> None:
    done = without("mlxtend", "tyro", command=f"recipes.{name}")
    assert done.returncode == 1
    assert done.stderr == 'error: recipes need mlxtend, tyro: pip install ".[recipes]"\n'


def test_the_packages_of_the_recipes_extra_are_those_that_are_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert (
        tuple(re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["recipes"]) == EXTRA
    )


def test_the_library_needs_no_package_of_an_extra() -> None:
    library = "psgrad,psgrad.dp,psgrad.ensemble,psgrad.interop.opacus"
    packages = [*EXTRA, "backpack", "tabulate"]
    marked = f"import sys; sys.modules.update(dict.fromkeys({packages})); import {library}"
    subprocess.run([sys.executable, "-c", marked], timeout=300, check=True)


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
