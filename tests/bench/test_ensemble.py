"""A cell of the ensemble benchmark: the gate, the time limit, processes and memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from psgrad import ConfigError, PsgradError
from psgrad.bench import ensemble, ensemble_report
from psgrad.bench.ensemble import Cell, measure_cell, peak_memory
from psgrad.bench.ensemble_fits import Fit, loop, ours
from psgrad.bench.ensemble_models import MODELS, built
from psgrad.bench.two_processes import shares, two_processes

TINY = Cell("mlp", 3, 4)


def models(members: int = 3) -> list[nn.Module]:
    return built(MODELS["mlp"][0], range(members), torch.float64, "cpu")


def data(members: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(members, 4, 20, dtype=torch.float64), torch.randint(10, (members, 4))


def test_who_is_wrong_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(models: Sequence[nn.Module]) -> Fit:
        right = loop(models)
        return Fit(lambda x, y: right.step(1.1 * x, y), right.parameters)

    monkeypatch.setattr(ensemble, "CONTENDERS", {"wrong": wrong})
    (result,) = measure_cell(TINY, rounds=1)
    assert result.measurement is None
    assert "wrong by" in result.reason


def test_one_member_is_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ensemble, "CONTENDERS", {"loop": loop, "two processes": two_processes})
    (plain,) = measure_cell(Cell("mlp", 1, 2), rounds=1, memory=True)
    assert plain.measurement is not None
    assert plain.memory
    both = measure_cell(Cell("mlp", 2, 2), rounds=1)
    assert [r.contender for r in both if r.measurement] == ["loop", "two processes"]
    ensemble_report.write([plain, *both], {}, {}, tmp_path)
    report = (tmp_path / "bench.md").read_text()
    first, second = [line.split("|") for line in report.splitlines() if line.startswith("| mlp")][:2]
    assert first[-2].strip() == ""
    assert second[-2].strip().endswith("x")
    assert "need two members" in report
    with pytest.raises(ConfigError, match="1 member for 2 processes"):
        two_processes(models(1))


_PARENT = """
import multiprocessing, sys, torch
from tests.bench.test_ensemble import data, models
from psgrad.bench.two_processes import two_processes
if __name__ == "__main__":
    fit = two_processes(models())
    batch = data()
    fit.step(*batch)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    while True:
        fit.step(*batch) if sys.argv[1] == "working" else sys.stdin.read()
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_those_that_clip_are_compared_with_a_loop_that_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "CONTENDERS", {"psgrad": ours})
    found = measure_cell(Cell("mlp", 2, 4), rounds=1, clipped=True)
    assert [(r.contender, r.reason) for r in found] == [
        ("psgrad", None),
        ("loop, clipped", None),
        ("psgrad, clipped", None),
    ]
    monkeypatch.setattr(ensemble, "CLIPPED", {"psgrad, clipped": ours})  # which does not clip
    _, wrong = measure_cell(Cell("mlp", 2, 4), rounds=1, clipped=True)
    assert wrong.reason.startswith("wrong by")
    _, refused = measure_cell(Cell("small-cnn-bn", 2, 4), rounds=1, clipped=True)
    assert "BatchNorm2d" in refused.reason


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("state", ["waiting", "working"])
def test_processes_end_when_who_started_them_is_killed(state: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, script, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(_runs, pids))
    finally:
        parent.kill()
        parent.communicate()
    end = time.monotonic() + 20
    while any(map(_runs, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_runs, pids))


def test_a_cell_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a step of the slow contender moves by 0.3 s, and any other call timed by 1 ms."""
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow(models: Sequence[nn.Module]) -> Fit:
        right = loop(models)
        return Fit(lambda x, y: (passes(0.3), right.step(x, y))[1], right.parameters)

    def stopwatch(run: Callable[[], object], repeats: int) -> float:
        began = now
        for _ in range(repeats):
            run()
            passes(0.001)
        return now - began

    monkeypatch.setattr(ensemble, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(ensemble, "on_cpu", stopwatch)
    monkeypatch.setattr(ensemble, "CONTENDERS", {"slow": slow, "late": loop})
    assert measure_cell(TINY, rounds=1, seconds=0.5) == "not done in 0.5 s"
    began = now
    found = measure_cell(TINY, rounds=1000, seconds=12.0)
    assert now - began < 12.5
    assert 30 <= len(found[0].measurement.ratios) <= 40

    few, many = measure_cell(TINY, rounds=10_000, seconds_each=0.5)
    assert len(few.measurement.ratios) == 1  # more than three times the others': one is enough
    assert 80 <= len(many.measurement.ratios) <= 100  # of five or six calls each


def test_a_stopped_cell_has_nothing() -> None:
    assert measure_cell(TINY, rounds=1, stop=lambda: True) == "stopped"


@pytest.mark.parametrize("members", [2, 3, 8])
def test_members_are_shared_out_in_order_and_evenly(members: int) -> None:
    first, second = shares(members)
    assert [*first, *second] == list(range(members))
    assert 0 <= len(second) - len(first) <= 1


def test_two_processes_fit_what_the_loop_fits_also_on_other_data_and_end() -> None:
    before = set(multiprocessing.active_children())
    truth, fit = loop(models()), two_processes(models())
    try:
        for batch in (data(), data()):
            for _ in range(2):
                truth.step(*batch)
                fit.step(*batch)
        for k in range(3):
            for expected, found in zip(truth.parameters(k), fit.parameters(k), strict=True):
                torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)
        assert len(set(multiprocessing.active_children()) - before) == 2
    finally:
        fit.close()
    assert set(multiprocessing.active_children()) == before


def test_what_fails_in_a_process_is_said_and_its_end_too() -> None:
    fit = two_processes(models())
    x, y = data()
    with pytest.raises(
        PsgradError, match=r"a process that fits members failed: RuntimeError: .*mat1 and mat2"
    ):
        fit.step(x[..., :7], y)
    fit.close()
    with pytest.raises(PsgradError, match="has ended"):
        fit.step(x, y)


def test_processes_are_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="for the CPU"):
        two_processes([nn.Linear(2, 2, device="meta")] * 2)


def test_memory_grows_with_members_and_of_processes_it_is_the_sum() -> None:
    small, large = (peak_memory(Cell("small-cnn-bn", 2, n), ensemble.LOOP) for n in (4, 256))
    assert 2**20 < small < large
    both = peak_memory(Cell("small-cnn-bn", 2, 4), "two processes")
    assert 1.2 * small < both < 2.2 * small
    assert peak_memory(TINY, "nobody") is None
    assert peak_memory(TINY, "psgrad", timeout=0.0) is None


@pytest.mark.parametrize("name", MODELS)
def test_models_take_their_data(name: str) -> None:
    make, image = MODELS[name]
    assert make()(torch.randn(2, *image)).shape == (2, 10)
