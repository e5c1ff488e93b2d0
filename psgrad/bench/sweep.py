"""One row of a benchmark: a layer at a batch size, every contender gated and then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log
from statistics import median
from typing import Literal

import torch

from psgrad.bench.cases import ConvCase
from psgrad.bench.gate import TOLERANCES, Expected, Verdict, judge
from psgrad.bench.peers import PEERS, SUITES, BenchVerb, Maker, ordinary_gradient, temporary_bytes
from psgrad.bench.tf32 import tf32
from psgrad.bench.timing import Measurement, Run, interleave, on_cpu, on_cuda
from psgrad.conv import plan

__all__ = ["Cell", "DType", "Result", "Setting", "geometric_mean", "geometric_means", "measure", "remeasure"]

DType = Literal["float32", "tf32", "bfloat16"]
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
TF32_TOLERANCE = 1e-2
PEER_BYTES = 4
"""A peer whose temporaries would take so many times the memory limit is not run."""
NOT_STRATEGIES = ("auto", *PEERS)


@dataclass(frozen=True)
class Result:
    """One contender on one case.

    Attributes
    ----------
    case, batch_size, contender
        What was measured.
    error
        As in `Verdict`.
    reason
        Why there is no measurement, or None.
    measurement
        None exactly if there is a reason.

    """

    case: str
    batch_size: int
    contender: str
    error: float
    reason: str | None
    measurement: Measurement | None


@dataclass(frozen=True)
class Setting:
    """A layer of a network, at a batch size, in a dtype."""

    network: str
    case: ConvCase
    batch_size: int
    dtype: DType

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        """For progress and lists."""
        return f"{self.network} {self.case.name} N={self.batch_size} {self.dtype}"


@dataclass(frozen=True)
class Cell:
    """What was found about one verb in one setting.

    Attributes
    ----------
    setting, verb
        What was measured.
    verdicts
        Of the gate, by contender.
    measurements
        By contender that is right; ratios are to the ordinary weight gradient.
    choices
        The strategy that the planner takes, by "auto" (costs only) and "measure"; empty for weighted_sum.
    repeated
        Whether it was measured again because it looked like a miss.

    """

    setting: Setting
    verb: BenchVerb
    verdicts: dict[str, Verdict]
    measurements: dict[str, Measurement]
    choices: dict[str, str]
    repeated: bool = False

    @property
    def strategies(self) -> list[str]:
        """Names of psgrad's strategies that have a number."""
        return [name for name in self.measurements if name not in NOT_STRATEGIES]

    @property
    def best_peer(self) -> str | None:
        """Name of the fastest peer, None if none has a number."""
        return self._least([name for name in PEERS if name in self.measurements])

    @property
    def best_strategy(self) -> str | None:
        """Name of the fastest strategy, None if none has a number."""
        return self._least(self.strategies)

    def quotient(self, name: str, other: str) -> float | None:
        """Time of one contender over another's, the median over the rounds they share; None without."""
        if name not in self.measurements or other not in self.measurements:
            return None
        pairs = zip(self.measurements[name].ratios, self.measurements[other].ratios, strict=False)
        return median(a / b for a, b in pairs)

    def regret(self, mode: str) -> float | None:
        """Time of the planner's choice over the best strategy's: 1 where it chose the best."""
        chosen, best = self.choices.get(mode), self.best_strategy
        if chosen is None or best is None or chosen not in self.measurements:
            return None
        return max(1.0, self.quotient(chosen, best) or 1.0)

    def _least(self, names: Sequence[str]) -> str | None:
        return min(names, key=lambda name: self.measurements[name].ratio, default=None)


def measure(
    setting: Setting,
    verbs: Iterable[BenchVerb],
    *,
    seconds: float,
    memory_limit: int,
    rounds: int = 15,
    suites: Mapping[BenchVerb, Mapping[str, Maker]] = SUITES,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Cell]:
    """Gate every contender, time those that are right, and yield a cell for each verb.

    Parameters
    ----------
    setting, verbs
        What to measure.
    seconds
        Time for one verb's rounds; a round that has begun is finished.
    memory_limit
        Bytes; a peer whose temporaries would take more than four times as much is not run.
    rounds
        At most.
    suites
        Contenders by verb.
    device
        "cpu" or "cuda".
    stop
        Once it says yes nothing more is yielded; a verb without one whole round is not either.

    """
    case, n = setting.case, setting.batch_size
    x, grad = case.operands(n, dtype=DTYPES[setting.dtype], device=device)
    with tf32(setting.dtype == "tf32"):
        expected = Expected(case, x, grad)
        tolerance = TF32_TOLERANCE if setting.dtype == "tf32" else TOLERANCES[x.dtype]
        for verb in verbs:
            verdicts: dict[str, Verdict] = {}
            runs: dict[str, Run] = {}
            for name, make in suites[verb].items():
                if stop():
                    return
                if name == "triton" and device == "cpu":
                    continue
                needed = temporary_bytes(name, case, n, setting.itemsize)
                if needed > PEER_BYTES * memory_limit:
                    reason = f"not run: {needed / 2**30:.1f} GiB of temporaries"
                    verdicts[name] = Verdict(float("nan"), reason)
                    continue
                try:
                    contender = make(case)
                except NotImplementedError as err:
                    verdicts[name] = Verdict(float("nan"), str(err))
                    continue
                verdicts[name] = judge(contender, x, grad, expected.verbs[verb], verb, tolerance)
                if verdicts[name].reason is None:
                    runs[name] = partial(contender, x, grad)
            timed = _time(case, x, grad, runs, seconds=seconds, rounds=rounds, stop=stop)
            if timed or not runs:
                yield Cell(setting, verb, verdicts, timed, _choices(case, x, grad, verb))


def remeasure(
    cell: Cell,
    *,
    seconds: float,
    rounds: int = 60,
    within: float = 1.6,
    suites: Mapping[BenchVerb, Mapping[str, Maker]] = SUITES,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> Cell:
    """Time a cell again, longer, and only who matters: psgrad, its choices, and who came near the best.

    The numbers replace the first ones; the cell as it is if not one round was finished.
    """
    case = cell.setting.case
    best = min(m.ratio for m in cell.measurements.values())
    names = [
        name
        for name, m in cell.measurements.items()
        if name == "auto"
        or name in cell.choices.values()
        or m.ratio < within * best
        or name == cell.best_peer
    ]
    x, grad = case.operands(cell.setting.batch_size, dtype=DTYPES[cell.setting.dtype], device=device)
    with tf32(cell.setting.dtype == "tf32"):
        runs: dict[str, Run] = {name: partial(suites[cell.verb][name](case), x, grad) for name in names}
        timed = _time(
            case, x, grad, runs, seconds=seconds, rounds=rounds, least_rounds=7, settled=0.02, stop=stop
        )
    if not timed:
        return cell
    return replace(cell, measurements=cell.measurements | timed, repeated=True)


def _time(
    case: ConvCase,
    x: torch.Tensor,
    grad: torch.Tensor,
    runs: dict[str, Run],
    *,
    seconds: float,
    rounds: int,
    stop: Callable[[], bool],
    settled: float = 0.05,
    least_rounds: int = 2,
) -> dict[str, Measurement]:
    return interleave(
        runs,
        partial(ordinary_gradient(case), x, grad),
        rounds=rounds,
        stopwatch=on_cuda if x.is_cuda else on_cpu,
        least_seconds=2e-3,
        seconds_each=seconds / (1 + len(runs)),
        least_rounds=least_rounds,
        settled=settled,
        stop=stop,
    )


def _choices(case: ConvCase, x: torch.Tensor, grad: torch.Tensor, verb: BenchVerb) -> dict[str, str]:
    if verb == "weighted_sum":
        return {}
    return {
        mode: plan(x, grad, case.weight_shape, case.geometry, verb, strategy=mode).chosen
        for mode in ("auto", "measure")
    }


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else float("nan")


def geometric_means(results: list[Result]) -> dict[str, tuple[float, int]]:
    """Geometric mean of the ratios by contender, and over how many cases; those without any left out."""
    ratios: dict[str, list[float]] = {}
    for result in results:
        if result.measurement is not None:
            ratios.setdefault(result.contender, []).append(result.measurement.ratio)
    return {name: (geometric_mean(values), len(values)) for name, values in ratios.items()}
