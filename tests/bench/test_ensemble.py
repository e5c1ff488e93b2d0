"""A cell of the ensemble benchmark: the gate, the time limit, processes and memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from psgrad import ConfigError, PsgradError
from psgrad.bench import ensemble
from psgrad.bench.ensemble import Cell, measure_cell, peak_memory
from psgrad.bench.ensemble_fits import Fit, loop
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


def test_one_member_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "CONTENDERS", {"loop": loop, "two processes": two_processes})
    plain, both = measure_cell(Cell("mlp", 1, 2), rounds=1, memory=True)
    assert plain.measurement is not None
    assert plain.memory
    assert both.measurement is None
    assert "1 member for 2 processes" in both.reason


def test_a_cell_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(models: Sequence[nn.Module]) -> Fit:
        right = loop(models)
        return Fit(lambda x, y: (time.sleep(0.3), right.step(x, y))[1], right.parameters)

    monkeypatch.setattr(ensemble, "CONTENDERS", {"slow": slow, "late": loop})
    assert measure_cell(TINY, rounds=1, seconds=0.5) == "not done in 0.5 s"
    began = time.monotonic()
    found = measure_cell(TINY, rounds=1000, seconds=3.0)
    assert time.monotonic() - began < 4
    assert len(found[0].measurement.ratios) < 10


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
