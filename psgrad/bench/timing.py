"""Interleaved timing: floor, A, B, C, then B, floor, C, A, ... and ratios within a round.

On a machine that others use too, seconds mean little; what a contender takes against the floor a
moment earlier does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf
from random import Random
from statistics import median, quantiles

import torch

__all__ = ["Measurement", "interleave", "on_cpu", "on_cuda"]

Run = Callable[[], object]
Stopwatch = Callable[[Run, int], float]
"""Seconds for so many calls in a row."""


@dataclass(frozen=True)
class Measurement:
    """One contender's times and their ratios to the floor's, a number a round.

    Attributes
    ----------
    seconds
        Of one call.
    ratios
        To the floor in the same round.

    """

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return median(self.ratios)

    @property
    def least_seconds(self) -> float:
        """Of one call, the least: a machine may be busy, but is never too fast."""
        return min(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        if len(self.ratios) == 1:
            return self.ratios[0], self.ratios[0]
        first, _, third = quantiles(self.ratios, n=4, method="inclusive")
        return first, third


def on_cpu(run: Run, repeats: int) -> float:
    """Seconds on the wall clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def on_cuda(run: Run, repeats: int) -> float:
    """Seconds between two events on the current stream, caches warm."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(
    contenders: Mapping[str, Run],
    floor: Run,
    *,
    rounds: int,
    stopwatch: Stopwatch = on_cpu,
    least_seconds: float = 5e-3,
    seconds_each: float = inf,
    least_rounds: int = 1,
    settled: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Measurement]:
    """Time the floor and each contender once a round, `rounds` times.

    Each round has an order of its own, the same ones in every run: who runs after whom decides what is
    in the caches and in the allocator. Taken in turns, each would always follow the same other.

    A round before the first warms up and is dropped; it also tells how many calls in a row each one
    needs for a time that the clock resolves.

    Parameters
    ----------
    contenders
        What to call, by name.
    floor
        What the ratios refer to.
    rounds
        At least 1.
    stopwatch
        `on_cpu` or `on_cuda`.
    least_seconds
        Shortest time to measure at once.
    seconds_each
        Time for one contender; who has used it up sits out the rounds that are left. Rounds end when the
        floor alone is left.
    least_rounds
        Rounds for everyone, whatever they take, but for those that took more than three times the fastest
        contender's time in the first: one is enough to know them by.
    settled
        Rounds end, after five, when everyone who still runs has quartiles closer together than this part
        of the median.
    stop
        Asked before every round; once it says yes, the rounds so far are returned.

    Returns
    -------
    dict[str, Measurement]
        By name; empty if not one round was finished.

    """
    everyone = {"": floor, **contenders}
    repeats, used = {}, {}
    for name, run in everyone.items():
        first_call = stopwatch(run, 1)
        call = stopwatch(run, 1) if first_call < seconds_each else first_call
        repeats[name] = max(1, ceil(least_seconds / max(call, 1e-9)))
        used[name] = first_call if name and repeats[name] == 1 else 0.0
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    names, orders = list(everyone), Random(0)
    for turn in range(rounds):
        fastest = min((seconds[name][0] for name in contenders), default=0.0) if turn else inf
        running = [
            name
            for name in names
            if not name
            or used[name] < seconds_each
            or turn < (1 if turn and seconds[name][0] > 3 * fastest else least_rounds)
        ]
        if stop() or (contenders and running == [""]):
            break
        if turn >= 5 and all(_narrow(seconds[name], seconds[""], settled) for name in running if name):
            break
        for name in orders.sample(running, len(running)):
            taken = stopwatch(everyone[name], repeats[name])
            used[name] += taken
            seconds[name].append(taken / repeats[name])
    if not seconds[""]:
        return {}
    return {name: _measurement(seconds[name], seconds[""]) for name in contenders}


def _measurement(seconds: list[float], floor: list[float]) -> Measurement:
    """Ratios round by round; who sat out the last rounds has fewer."""
    return Measurement(tuple(seconds), tuple(t / f for t, f in zip(seconds, floor, strict=False)))


def _narrow(seconds: list[float], floor: list[float], settled: float) -> bool:
    measurement = _measurement(seconds, floor)
    low, high = measurement.spread
    return high - low < settled * measurement.ratio
