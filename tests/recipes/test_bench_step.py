"""`recipes.bench_step` through its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psgrad import ConfigError
from psgrad.bench.step_peers import STEPPERS
from recipes import bench_step
from recipes.bench_step import BenchStep
from recipes.config import from_command_line


@pytest.fixture(autouse=True)
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_tiny_benchmark_from_end_to_end(out: Path) -> None:
    command = [sys.executable, "-m", "recipes.bench_step", "--cases", "tiny:4", "tiny:8", "--rounds", "2"]
    command += ["--largest-batch-gib", "0.001", "--contenders", "psgrad clip", "backpack", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert {path.name for path in out.iterdir()} == {"bench.md", "bench.png", "bench.json"}
    record = json.loads((out / "bench.json").read_text())
    found = {(r["case"], r["batch_size"], r["contender"]): r for r in record["results"]}
    assert found.keys() == {("tiny", n, name) for n in (4, 8) for name in ("psgrad clip", "backpack")}
    ours, other = found["tiny", 8, "psgrad clip"], found["tiny", 8, "backpack"]
    assert len(ours["measurement"]["ratios"]) == 2
    assert 0.5 < ours["memory"] < 3
    assert other["memory"] is None
    assert "leaves out '1.weight'" in other["reason"]
    assert record["about"]["largest batch of the non-private step"] == "tiny none"  # in a MiB


def test_ctrl_c_keeps_what_was_measured(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench_step.measure_step

    def interrupted(*args, **kwargs):
        results = measure(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return results

    monkeypatch.setattr(bench_step, "measure_step", interrupted)
    arguments = ["--cases", "tiny:2", "tiny:3", "--rounds", "1", "--out", str(out)]
    arguments += ["--contenders", "psgrad clip"]
    assert bench_step.main(arguments) == 0
    assert "interrupted" in capsys.readouterr().out
    record = json.loads((out / "bench.json").read_text())
    assert [r["batch_size"] for r in record["results"]] == [2]

    monkeypatch.setattr(bench_step, "measure_step", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or [])
    with pytest.raises(ConfigError, match="nothing was measured"):
        bench_step.main(arguments)


def test_what_was_measured_is_written_before_the_next_case(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench_step.measure_step

    def dies_in_the_second(model, made, n, *args, **kwargs):
        if n == 3:
            raise KeyboardInterrupt
        return measure(model, made, n, *args, **kwargs)

    monkeypatch.setattr(bench_step, "measure_step", dies_in_the_second)
    arguments = ["--cases", "tiny:2", "tiny:3", "--rounds", "1", "--no-memory", "--out", str(out)]
    arguments += ["--contenders", "psgrad clip"]
    with pytest.raises(KeyboardInterrupt):
        bench_step.main(arguments)
    record = json.loads((out / "bench.json").read_text())
    assert [r["batch_size"] for r in record["results"]] == [2]


def test_the_largest_batch_is_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "peak_memory", lambda model, contender, n, device: n * 2**20)
    settings = from_command_line(BenchStep, bench_step.DEFAULT, ["--largest-batch-gib", "0.1"])
    assert 91 <= (bench_step.largest("tiny", "psgrad clip", settings) or 0) <= 102
    monkeypatch.setattr(bench_step, "peak_memory", lambda model, contender, n, device: None)
    assert bench_step.largest("tiny", "psgrad clip", settings) is None


@pytest.mark.parametrize("case", ["tiny", "tiny:", "tiny:0", "tiny:-1", "tiny:x", "tyni:4"])
def test_a_case_that_is_none_is_refused(case: str) -> None:
    with pytest.raises(ConfigError, match=r"no model 'tyni'; there are resnet18-gn|is not MODEL:BATCH_SIZE"):
        bench_step.main(["--cases", case])


def test_a_contender_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no 'opaque'; there are psgrad clip"):
        bench_step.main(["--contenders", "opaque"])


@pytest.mark.parametrize("name", ["bench_step", "bench_step_sweep"])
def test_the_committed_configurations_and_the_quick_cases_are_possible(name: str) -> None:
    settings = from_command_line(BenchStep, bench_step.DEFAULT.with_stem(name), [])
    for case in (*settings.cases, *bench_step.QUICK):
        bench_step.parse_case(case)
    assert bench_step.chosen(settings.contenders) == STEPPERS


def test_the_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psgrad.bench.report.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        bench_step.main(["--cases", "tiny:2"])
