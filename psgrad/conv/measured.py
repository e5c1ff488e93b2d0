"""Measured choices: the strategies timed once per problem, and remembered on disk."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from threading import Lock

import torch
from torch import Tensor

from psgrad.conv.planner import Plan, choose
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.processor import processor
from psgrad.conv.strategies import STRATEGIES, Verb

__all__ = ["cache_file", "machine_key", "measure"]

SCHEMA = 1
"""Of the file; one with another number is not read."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a file may raise that is corrupt, or of another schema."""

ROUNDS = (3, 40)
"""At least and at most so many, of short problems as many as fit into `SECONDS`."""
SECONDS = 0.05
ALIKE = 1.03
"""What the costs choose is kept if nothing was measured to be faster by more than this."""
WORTH_TIMING = 8.0
"""A strategy that the costs put at more than so many times the cheapest is not timed."""


def cache_file() -> Path:
    """Return where choices are kept: `$PSGRAD_CACHE`, else `~/.cache/psgrad` (`$XDG_CACHE_HOME`).

    A user without a home, as in some containers, has the system's folder for temporary files.
    """
    root = os.environ.get("PSGRAD_CACHE")
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME")
        root = str((Path(base) if base else _own_folder()) / "psgrad")
    return Path(root) / "measured.json"


def _own_folder() -> Path:
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir())


def measure(problem: WeightGradProblem, verb: Verb) -> Plan:
    """Plan a problem by timing its candidates, once.

    The first plan of a problem on a machine (device, number of threads, versions of PyTorch and psgrad)
    takes a few calls of each strategy on random tensors; later ones, in any process, a look-up. A file
    that cannot be read or written is passed over with a warning. Strided layouts are timed as contiguous.

    Returns
    -------
    Plan
        As `choose` makes it, with measured seconds for those that were timed.

    """
    plan = choose(problem, verb)
    if problem.samples == 0 or len(plan.seconds) == 1:
        return plan
    key = _key(problem, verb)
    seconds = _CHOICES.get(key)
    if not seconds or not set(seconds) <= set(plan.seconds):
        seconds = _time(plan)
        _CHOICES.put(key, seconds)
    fastest = min(seconds, key=lambda name: seconds[name])
    alike = seconds.get(plan.chosen, float("inf")) <= ALIKE * seconds[fastest]
    return replace(plan, chosen=plan.chosen if alike else fastest, seconds=plan.seconds | seconds)


def _time(plan: Plan) -> dict[str, float]:
    """Seconds of each candidate, the least of interleaved rounds."""
    p = plan.problem
    rows = p.samples * p.rows_per_sample
    drawn = Random(0)  # not torch's: a seeded run does not depend on what is in the file
    sizes = (
        (rows, p.groups * p.in_per_group, *p.input_size),
        (rows, p.groups * p.out_per_group, *p.output_size),
    )
    x, grad = (_noise(size, drawn).to(p.device, p.dtype) for size in sizes)
    limit = WORTH_TIMING * min(plan.seconds.values())
    names = [name for name, seconds in plan.seconds.items() if seconds <= limit]
    best = dict.fromkeys(names, float("inf"))
    (least, most), orders = ROUNDS, Random(0)
    with torch.no_grad():
        start = time.perf_counter()
        for turn in range(most + 1):  # the first warms up
            if turn > least and time.perf_counter() - start > SECONDS:
                break
            for name in orders.sample(names, len(names)):  # who runs after whom decides what is in the caches
                taken = _seconds(partial(getattr(STRATEGIES[name], plan.verb), x, grad, p), p.device)
                if turn:
                    best[name] = min(best[name], taken)
    return best


def _noise(size: tuple[int, ...], drawn: Random) -> Tensor:
    """Return numbers from -1 to 1, float32, also under a `torch.vmap`, where torch may not draw any."""
    count = math.prod(size)
    values = torch.frombuffer(bytearray(drawn.randbytes(count + 1)), dtype=torch.uint8)[:count]
    return (values.view(size) - 127.5) / 128


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_key(device: torch.device) -> str:
    """What a timing depends on besides the problem."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{', '.join(filter(None, processor()))}, {os.cpu_count()} cores"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, psgrad {version('psgrad')}"


def _key(problem: WeightGradProblem, verb: Verb) -> str:
    g = problem.geometry
    numbers = (
        (problem.samples, problem.rows_per_sample, g.groups, problem.out_per_group, problem.in_per_group),
        (problem.input_size, problem.output_size, g.kernel_size, g.stride, g.symmetric_padding, g.dilation),
    )
    return f"{machine_key(problem.device)} | {verb} {problem.dtype} {numbers}"


class _Choices:
    """Seconds by problem and strategy, in memory and in the file."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._path: Path | None = None
        self._known: dict[str, dict[str, float]] = {}

    def get(self, key: str) -> dict[str, float] | None:
        with self._lock:
            if self._path != cache_file():
                self._path = cache_file()
                self._known = self._read(self._path)
            return self._known.get(key)

    def put(self, key: str, seconds: dict[str, float]) -> None:
        with self._lock:
            self._known[key] = seconds
            path = cache_file()
            # another process may have written meanwhile
            self._known = self._read(path) | self._known
            part = path.with_suffix(f".{os.getpid()}.part")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_text(json.dumps({"schema": SCHEMA, "seconds": self._known}, indent=1))
                os.replace(part, path)
            except OSError as err:
                warnings.warn(f"measured strategies are not kept: {err}", stacklevel=2)

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, float]]:
        try:
            content = json.loads(path.read_text())
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
            found = {
                str(key): {str(name): float(seconds) for name, seconds in entry.items()}
                for key, entry in content["seconds"].items()
            }
            if not all(0 <= s < math.inf for entry in found.values() for s in entry.values()):
                raise ValueError("a time that is none")
            return found
        except FileNotFoundError:
            return {}
        except UNREADABLE as err:
            warnings.warn(f"{path} is passed over: {err}", stacklevel=2)
            return {}


_CHOICES = _Choices()
