"""`recipes.bench_ensemble` through its main function."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from psgrad import ConfigError
from psgrad.bench import ensemble, ensemble_report
from recipes import bench_ensemble

TINY = ["--models", "mlp", "--members", "2", "--batch-sizes", "2", "3", "--rounds", "1"]


def record(folder: Path):
    return json.loads((folder / "bench.json").read_text())


def test_a_tiny_benchmark_from_end_to_end(tmp_path: Path) -> None:
    time_enough = ["--cell-seconds", "600", "--minutes", "60"]  # for a busy machine: five rounds end it
    options = [*TINY, *time_enough, "--largest-cell", "4", "--out", str(tmp_path)]
    assert bench_ensemble.main(options) == 0
    found = record(tmp_path)
    assert found["left_out"] == {"mlp K=2 N=3": "K times N is over 4"}
    assert {r["contender"]: r["reason"] for r in found["results"]} == dict.fromkeys(ensemble.CONTENDERS)
    assert all(r["memory"] > 0 and r["loop_memory"] > 0 for r in found["results"])
    text = (tmp_path / "bench.md").read_text()
    assert "asked: 0.98x" in text
    assert "## Peak memory" in text
    assert "- mlp K=2 N=3: K times N is over 4" in text
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench_ensemble.measure_cell

    def interrupted(*args, **kwargs):
        results = measure(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return results

    monkeypatch.setattr(bench_ensemble, "measure_cell", interrupted)
    bench_ensemble.main([*TINY, "--cell-seconds", "600", "--no-memory", "--out", str(tmp_path)])
    assert record(tmp_path)["left_out"] == {"mlp K=2 N=3": "stopped"}


def test_what_was_measured_is_written_before_the_next_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench_ensemble.measure_cell

    def dies_in_the_second(cell, **kwargs):
        if cell.batch_size == 3:
            raise KeyboardInterrupt
        return measure(cell, **kwargs)

    monkeypatch.setattr(bench_ensemble, "measure_cell", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench_ensemble.main([*TINY, "--cell-seconds", "600", "--no-memory", "--out", str(tmp_path)])
    assert {r["cell"]["batch_size"] for r in record(tmp_path)["results"]} == {2}


def test_a_cell_that_takes_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlp K=2 N=2: the float64 check would take .*; mlp K=2 N=3"):
        bench_ensemble.main([*TINY, "--cell-seconds", "1e-9", "--out", str(tmp_path)])


def test_a_run_that_takes_too_long_names_what_is_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlp K=2 N=2: the 1e-09 minutes were over"):
        bench_ensemble.main([*TINY, "--minutes", "1e-9", "--out", str(tmp_path)])


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no mpl; there are mlp"):
        bench_ensemble.main(["--models", "mpl"])


def test_a_report_of_who_was_wrong_names_the_reason(tmp_path: Path) -> None:
    cell = ensemble.Cell("mlp", 2, 3)
    wrong = ensemble.EnsembleResult(cell, "psgrad", 0.1, "wrong by 1.0e-01", None)
    ensemble_report.write([wrong], {}, {}, tmp_path)
    assert "wrong by 1.0e-01" in (tmp_path / "bench.md").read_text()
    ensemble_report.draw([wrong], tmp_path / "bench.png")
