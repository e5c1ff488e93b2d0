"""Interleaving, ratios and quartiles, on a clock that the test winds."""

from __future__ import annotations

import pytest

from psgrad.bench.timing import Measurement, interleave, on_cpu


class Clock:
    """A stopwatch whose calls take what `prices` says; every measurement is noted."""

    def __init__(self, prices: dict[str, float]) -> None:
        self.prices = prices
        self.seen: list[tuple[str, int]] = []

    def __call__(self, run, repeats: int) -> float:
        name = run()
        self.seen.append((name, repeats))
        return self.prices[name] * repeats


def runs(*names: str) -> dict:
    return {name: lambda name=name: name for name in names}


def test_in_every_round_everyone_is_timed_once_and_nobody_always_follows_the_same() -> None:
    clock = Clock({"floor": 1.0, "a": 2.0, "b": 3.0})
    interleave(runs("a", "b"), lambda: "floor", rounds=30, stopwatch=clock)
    turns = [name for name, _ in clock.seen]
    assert turns[:6] == ["floor", "floor", "a", "a", "b", "b"]  # warm-up and calibration
    rounds = [turns[start : start + 3] for start in range(6, len(turns), 3)]
    assert all(set(names) == {"floor", "a", "b"} for names in rounds)
    assert {(names[0], names[1]) for names in rounds} == {
        (first, second) for first in clock.prices for second in clock.prices if first != second
    }


def test_ratios_are_within_a_round_and_the_warm_up_is_dropped() -> None:
    clock = Clock({"floor": 1.0, "a": 100.0})
    load = [1.0, 10.0, 4.0]

    def watch(run, repeats: int) -> float:
        taken = clock(run, repeats)
        turn = (len(clock.seen) - 1) // 2 - 2  # two turns of two calls before the first round
        if turn >= 0:
            clock.prices["a"] = 2.0
            return clock.prices[run()] * load[turn] * repeats
        return taken

    measured = interleave(runs("a"), lambda: "floor", rounds=3, stopwatch=watch)
    assert measured["a"].ratios == (2.0, 2.0, 2.0)
    assert measured["a"].seconds == (2.0, 20.0, 8.0)


def test_short_calls_are_repeated_until_the_clock_resolves_them() -> None:
    clock = Clock({"floor": 1e-3, "a": 2e-4, "b": 1.0})
    measured = interleave(runs("a", "b"), lambda: "floor", rounds=1, stopwatch=clock, least_seconds=1e-2)
    assert dict(clock.seen[-3:]) == {"floor": 10, "a": 50, "b": 1}
    assert measured["a"].ratio == pytest.approx(0.2)
    assert measured["b"].ratio == pytest.approx(1000)


def test_stopping_keeps_whole_rounds() -> None:
    answers = iter([False, False, True])
    clock = Clock({"floor": 1.0, "a": 2.0})
    measured = interleave(runs("a"), lambda: "floor", rounds=9, stopwatch=clock, stop=lambda: next(answers))
    assert len(measured["a"].ratios) == 2
    assert interleave(runs("a"), lambda: "floor", rounds=9, stopwatch=clock, stop=lambda: True) == {}


def test_who_has_used_up_its_time_sits_out() -> None:
    clock = Clock({"floor": 1.0, "fast": 1.0, "slow": 50.0})
    measured = interleave(runs("fast", "slow"), lambda: "floor", rounds=9, stopwatch=clock, seconds_each=6.5)
    assert len(measured["slow"].ratios) == 1
    assert measured["slow"].ratio == 50.0
    assert len(measured["fast"].ratios) == 6  # one of its calls warmed up
    assert clock.seen[-1][0] in ("fast", "floor")


def test_the_first_rounds_are_for_everyone_but_the_slowest() -> None:
    clock = Clock({"floor": 1.0, "fast": 30.0, "slow": 91.0})
    names = runs("fast", "slow")
    measured = interleave(names, lambda: "floor", rounds=9, stopwatch=clock, seconds_each=1.0, least_rounds=4)
    assert {name: len(m.ratios) for name, m in measured.items()} == {"fast": 4, "slow": 1}


def test_rounds_end_when_the_numbers_have_settled() -> None:
    clock = Clock({"floor": 1.0, "a": 2.0})
    measured = interleave(runs("a"), lambda: "floor", rounds=99, stopwatch=clock, settled=0.05)
    assert len(measured["a"].ratios) == 5


def test_median_and_quartiles() -> None:
    measurement = Measurement(seconds=(1.0,) * 5, ratios=(5.0, 1.0, 3.0, 2.0, 4.0))
    assert measurement.ratio == 3.0
    assert measurement.spread == (2.0, 4.0)
    assert Measurement((1.0,), (2.0,)).spread == (2.0, 2.0)


def test_the_wall_clock_counts_every_call() -> None:
    calls = []
    assert on_cpu(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5
