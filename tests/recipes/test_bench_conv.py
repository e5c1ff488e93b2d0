"""`recipes.bench_conv` through its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from psgrad import ConfigError
from psgrad.bench.cases import CASE_SETS
from recipes import bench_conv


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.bench_conv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_tiny_benchmark_from_end_to_end(tmp_path: Path) -> None:
    done = run("--sets", "tiny", "--batch-sizes", "2", "3", "--rounds", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "tiny 2-3 3x3 @5" in done.stdout
    assert "geometric mean" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bench.md", "bench.png", "bench.json"}
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {r["batch_size"] for r in record["results"]} == {2, 3}
    assert all(r["reason"] is None and len(r["measurement"]["ratios"]) == 2 for r in record["results"])
    assert len(record["results"]) == 2 * 2 * 6
    assert record["about"]["rounds"] == "2"


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench_conv.measure_case

    def interrupted(*args, **kwargs):
        results = measure(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return results

    monkeypatch.setattr(bench_conv, "measure_case", interrupted)
    arguments = ["--sets", "tiny", "--batch-sizes", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert bench_conv.main(arguments) == 0
    assert "interrupted" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {r["case"] for r in record["results"]} == {"tiny 2-3 3x3 @5"}

    monkeypatch.setattr(bench_conv, "measure_case", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or [])
    with pytest.raises(ConfigError, match="nothing was measured"):
        bench_conv.main(arguments)


def test_every_set_can_be_chosen_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(get_args(bench_conv.SetName)) == set(CASE_SETS)
    with pytest.raises(SystemExit, match="2"):
        bench_conv.main(["--sets", "resnet"])
    assert "resnet18-cifar" in capsys.readouterr().err


def test_the_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_conv.report, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        bench_conv.main(["--sets", "tiny"])
