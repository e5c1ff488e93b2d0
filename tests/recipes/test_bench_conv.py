"""`recipes.bench_conv` through its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from psgrad import ConfigError
from psgrad.bench import rates
from psgrad.bench.case_sets import CASE_SETS
from psgrad.conv.planner import DeviceRates
from psgrad.conv.processor import Processor
from recipes import bench_conv
from recipes.config import from_command_line

DTYPES = ("float32", "bfloat16")
TINY = ["--sets", "tiny", "--batch-sizes", "2", "--dtypes", "float32", "--minutes", "60", "--rounds", "2"]
"""Two rounds end it, not the time, which a busy machine may need."""


@pytest.fixture(autouse=True)
def _rates_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PSGRAD_CACHE", str(tmp_path / "cache"))
    known = DeviceRates(flops=1e11, bytes=1e10, call=1e-6)
    monkeypatch.setattr(rates, "measure_rates", lambda device, dtype: known)
    monkeypatch.setattr(bench_conv, "looks_like_a_miss", lambda cell: False)  # or it is measured for long


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.bench_conv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_tiny_benchmark_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert bench_conv.main([*TINY, "--dtypes", "float32", "bfloat16", "--out", str(out)]) == 0
    assert "grads / floor, results under 32 MB, geometric mean" in capsys.readouterr().out
    record = json.loads((out / "bench.json").read_text())
    assert {(c["dtype"], c["batch_size"]) for c in record["cells"]} == {("float32", 2), ("bfloat16", 8)}
    assert {c["verb"] for c in record["cells"]} == {"grads", "sq_norms", "weighted_sum"}
    assert all("ratio" in c["contenders"]["auto"] for c in record["cells"])
    assert len(record["cells"]) == 3 * 3 * 2
    first = [c["layer"] for c in record["cells"][:3]]
    assert first == [case.name for case in CASE_SETS["tiny"]]
    assert record["rates"]["float32"]["flops"] > 0
    pictures = {f"{verb}-{d}.png" for verb in get_args(bench_conv.conv_report.BenchVerb) for d in DTYPES}
    assert {path.name for path in out.iterdir()} == {"bench.md", "bench.json"} | pictures


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench_conv.measure

    def interrupted(*args, **kwargs):
        cells = list(measure(*args, **kwargs))
        os.kill(os.getpid(), signal.SIGINT)
        return cells

    monkeypatch.setattr(bench_conv, "measure", interrupted)
    arguments = [*TINY, "--verbs", "grads", "--out", str(tmp_path)]
    assert bench_conv.main(arguments) == 0
    assert "interrupted" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [c["layer"] for c in record["cells"]] == [CASE_SETS["tiny"][1].name]  # the cheapest
    assert "interrupted" in record["about"]["taken"]

    monkeypatch.setattr(bench_conv, "measure", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or [])
    with pytest.raises(ConfigError, match="nothing was measured"):
        bench_conv.main(arguments)


def test_a_run_that_is_killed_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = bench_conv.measure, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return measure(*args, **kwargs)

    monkeypatch.setattr(bench_conv, "measure", killed)
    monkeypatch.setattr(bench_conv, "WRITE_EVERY", 2)
    with pytest.raises(MemoryError):
        bench_conv.main([*TINY, "--verbs", "grads", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["cells"]) == 2
    assert "not all" in record["about"]["taken"]


def test_what_looks_like_a_miss_is_measured_again_and_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = []

    def remeasure(cell, *, seconds, **kwargs):
        again.append(seconds)
        return replace(cell, repeated=True)

    monkeypatch.setattr(bench_conv, "looks_like_a_miss", lambda cell: cell.setting.case.groups > 1)
    monkeypatch.setattr(bench_conv, "remeasure", remeasure)
    assert bench_conv.main([*TINY, "--verbs", "grads", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [c["repeated"] for c in record["cells"]] == [case.groups > 1 for case in CASE_SETS["tiny"]]
    assert again == [10.0]


def settings(*arguments: str) -> bench_conv.BenchConv:
    return from_command_line(bench_conv.BenchConv, bench_conv.DEFAULT, list(arguments))


def test_each_layer_is_measured_once_and_what_is_too_large_is_listed_with_the_reason() -> None:
    todo, left_out = bench_conv.select(settings("--batch-sizes", "1", "256"))
    names = [str(setting) for setting in todo]
    assert len(set(names)) == len(names)
    assert len({(s.case, s.batch_size, s.dtype) for s in todo}) == len(todo)
    layers = {case for name, cases in CASE_SETS.items() if name != "tiny" for case in cases}
    assert len(todo) + len(left_out) == 3 * len(layers)
    assert left_out["resnet18-32 512-512 3x3 @4 N=256 float32"] == "per-sample gradients of 2304 MiB"
    assert left_out["resnet50-224 3-64 7x7/2 @224 N=256 float32"] == "operands of 931 MiB"
    assert left_out["resnet18-32 64-64 3x3 @32 N=256 float32"] == "19.3 GFLOP"


def test_tf32_on_the_cpu_is_refused() -> None:
    done = run("--dtypes", "tf32", "--sets", "tiny")
    assert done.returncode == 1
    assert done.stderr.startswith("error: dtypes: tf32 is arithmetic of NVIDIA's tensor cores")


def test_a_report_goes_to_the_folder_of_its_machine() -> None:
    names = {}
    for version in ("", "cpu family 25, model 17", "cpu family 26, model 2"):
        cpu = Processor("AuthenticAMD", "AMD EPYC", version, "AVX512")
        names[version] = bench_conv.default_folder(settings(), cpu, cpu.name).parent.name
        assert bench_conv.default_folder(settings("--quick"), cpu, cpu.name) == Path("runs/bench_conv")
    cores = f"avx512-{os.cpu_count()}-cores"
    assert list(names.values()) == [f"epyc-{cores}", f"epyc-family25-{cores}", f"epyc-family26-{cores}"]


def test_every_set_can_be_chosen_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(get_args(bench_conv.SetName)) == set(CASE_SETS)
    with pytest.raises(SystemExit, match="2"):
        bench_conv.main(["--sets", "resnet"])
    assert "resnet18-32" in capsys.readouterr().err


def test_the_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_conv.report, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        bench_conv.main(["--sets", "tiny"])


def test_the_suite_of_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_conv, "RULE_CASES", bench_conv.RULE_CASES[:1])
    assert bench_conv.main(["--suite", "rules", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "Batch rules of convolution" in (tmp_path / "bench.md").read_text()
