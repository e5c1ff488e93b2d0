"""What this machine does per second, measured once and remembered on disk."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from psgrad.conv.half import is_emulated
from psgrad.conv.measured import UNREADABLE, cache_file, machine_key
from psgrad.conv.planner import DeviceRates

__all__ = ["device_rates", "measure_rates", "rates_file"]

SCHEMA = 1
"""Of the file; one with another number is not read."""

ROUNDS = 7
MATRIX = {"cpu": 1536, "cuda": 8192}
EMULATED_MATRIX = 256
"""Of a dtype without instructions, in which the other would take half a minute."""
COPIED_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
"""Of source and destination together: far more than a cache holds."""
CALLS = 200


def rates_file() -> Path:
    """Return where rates are kept: beside the measured choices."""
    return cache_file().with_name("rates.json")


def device_rates(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DeviceRates:
    """Return the rates of a device, measured the first time a machine is asked (about a second).

    Kept by device, number of threads, versions of PyTorch and psgrad, and dtype. A file that is corrupt,
    of another schema, or cannot be read or written is passed over with a warning.

    Parameters
    ----------
    device
        Where.
    dtype
        Of the matrix product. `flops` are FLOP/s of that dtype; the other rates do not depend on it.

    """
    device = torch.device(device)
    allowed = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = ", tf32" if allowed else ""
    key = f"{machine_key(device)} | {dtype}{tf32}"
    path = rates_file()
    known = _read(path)
    if key not in known:
        known[key] = measure_rates(device, dtype)
        _write(path, known)
    return known[key]


@torch.no_grad()
def measure_rates(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DeviceRates:
    """Measure now: the best of a few rounds each, for a machine may be busy but is never too fast."""
    device = torch.device(device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    size = EMULATED_MATRIX if is_emulated(dtype, device) else MATRIX[kind]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(COPIED_BYTES[kind] // 2, dtype=torch.uint8, device=device)
    copy = torch.zeros_like(source)
    one = torch.zeros(1, device=device)

    def calls() -> None:
        for _ in range(CALLS):
            one.add_(1)

    return DeviceRates(
        flops=2 * size**3 / _least_seconds(lambda: torch.mm(a, b, out=product), device),
        bytes=2 * source.numel() / _least_seconds(lambda: copy.copy_(source), device),
        call=_least_seconds(calls, device) / CALLS,
    )


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()  # warms up
    least = float("inf")
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        least = min(least, time.perf_counter() - start)
    return least


def _read(path: Path) -> dict[str, DeviceRates]:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
        return {str(key): _rates(entry) for key, entry in content["rates"].items()}
    except FileNotFoundError:
        return {}
    except UNREADABLE as err:
        warnings.warn(f"{path} is passed over: {err!r}", stacklevel=3)
        return {}


def _rates(entry: dict[str, float]) -> DeviceRates:
    rates = DeviceRates(float(entry["flops"]), float(entry["bytes"]), float(entry["call"]))
    if not all(0 < rate < float("inf") for rate in (rates.flops, rates.bytes, rates.call)):
        raise ValueError(f"{rates} is not positive and finite")
    return rates


def _write(path: Path, known: dict[str, DeviceRates]) -> None:
    record = {
        key: {"flops": rates.flops, "bytes": rates.bytes, "call": rates.call} for key, rates in known.items()
    }
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"schema": SCHEMA, "rates": record}, indent=1))
        os.replace(part, path)
    except OSError as err:
        warnings.warn(f"measured rates are not kept: {err}", stacklevel=3)
