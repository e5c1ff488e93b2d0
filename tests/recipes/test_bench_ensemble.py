"""`recipes.bench_ensemble` through its main function."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from psgrad import ConfigError
from psgrad.bench import ensemble
from recipes import bench_ensemble

TINY = ["--models", "mlp", "--members", "2", "--batch-sizes", "2", "3", "--rounds", "1"]


def test_a_tiny_benchmark_from_end_to_end(tmp_path: Path) -> None:
    assert bench_ensemble.main([*TINY, "--largest-cell", "4", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["left_out"] == ["mlp K=2 N=3"]
    assert {r["contender"]: r["reason"] for r in record["results"]} == dict.fromkeys(ensemble.CONTENDERS)
    assert "asked: 0.98x" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_who_is_wrong_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(models: list[nn.Module]) -> tuple[ensemble.Step, ensemble.Parameters]:
        step, parameters = ensemble.loop(models)
        return (lambda x, y: step(1.1 * x, y)), parameters

    monkeypatch.setitem(ensemble.CONTENDERS, "wrong", wrong)
    found = ensemble.measure_ensemble("mlp", *bench_ensemble.MODELS["mlp"], 2, 3, rounds=1)
    (result,) = [r for r in found if r.contender == "wrong"]
    assert result.measurement is None
    assert "wrong by" in (result.reason or "")


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench_ensemble.measure_ensemble

    def interrupted(*args, **kwargs):
        results = measure(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return results

    monkeypatch.setattr(bench_ensemble, "measure_ensemble", interrupted)
    bench_ensemble.main([*TINY, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "bench.json").read_text())["left_out"] == ["mlp K=2 N=3"]


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no mpl; there are mlp"):
        bench_ensemble.main(["--models", "mpl"])


@pytest.mark.parametrize("name", bench_ensemble.MODELS)
def test_models_take_their_data(name: str) -> None:
    make, image = bench_ensemble.MODELS[name]
    assert make()(torch.randn(2, *image)).shape == (2, 10)
