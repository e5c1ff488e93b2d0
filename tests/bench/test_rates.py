"""Device rates: measured once, remembered, and never in the way."""

import json

import pytest
import torch

from psgrad.bench import rates
from psgrad.conv.planner import DeviceRates

KNOWN = DeviceRates(flops=2.0e11, bytes=1.0e10, call=2.0e-6)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSGRAD_CACHE", str(tmp_path))
    return tmp_path / "rates.json"


@pytest.fixture
def measured(monkeypatch):
    """Count what is measured, and spare the time."""
    seen = []

    def count(device, dtype):
        seen.append(dtype)
        return KNOWN

    monkeypatch.setattr(rates, "measure_rates", count)
    return seen


def test_the_rates_of_a_machine_that_exists(monkeypatch):
    monkeypatch.setattr(rates, "MATRIX", {"cpu": 256})
    monkeypatch.setattr(rates, "COPIED_BYTES", {"cpu": 2**24})
    found = rates.measure_rates()
    assert 1e8 < found.flops < 1e14
    assert 1e8 < found.bytes < 1e13
    assert 1e-8 < found.call < 1e-3


def test_measured_once_by_dtype_and_kept(measured, empty_cache):
    for _ in range(2):
        assert rates.device_rates() == KNOWN
    assert rates.device_rates("cpu", torch.bfloat16) == KNOWN
    assert measured == [torch.float32, torch.bfloat16]
    assert len(json.loads(empty_cache.read_text())["rates"]) == 2


def test_other_threads_are_another_machine(measured, monkeypatch):
    rates.device_rates()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    rates.device_rates()
    assert len(measured) == 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 10_000,
        '{"schema": 0, "rates": {}}',
        '{"schema": 1}',
        '{"schema": 1, "rates": {"here": {"flops": 1, "bytes": 1}}}',
        '{"schema": 1, "rates": {"here": {"flops": 0, "bytes": 1, "call": 1}}}',
        '{"schema": 1, "rates": {"here": {"flops": 1' + "0" * 400 + ', "bytes": 1, "call": 1}}}',
    ],
    ids=lambda content: content[:50],
)
def test_a_file_that_is_corrupt_or_stale_is_passed_over(empty_cache, measured, content):
    empty_cache.write_text(content)
    with pytest.warns(UserWarning, match="passed over"):
        assert rates.device_rates() == KNOWN
    assert measured == [torch.float32]
    assert rates.device_rates() == KNOWN  # and replaced
    assert measured == [torch.float32]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, measured):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PSGRAD_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match=r"passed over|not kept"):
        assert rates.device_rates() == KNOWN
