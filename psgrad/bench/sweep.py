"""One cell row of a benchmark: a case at a batch size, every contender gated and then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import exp, log

import torch

from psgrad.bench.cases import ConvCase
from psgrad.bench.gate import check
from psgrad.bench.peers import Maker, ordinary_gradient
from psgrad.bench.timing import Measurement, interleave, on_cpu, on_cuda
from psgrad.conv.strategies import Verb

__all__ = ["Result", "geometric_means", "measure_case"]


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


def measure_case(
    case: ConvCase,
    batch_size: int,
    makers: Mapping[str, Maker],
    *,
    verb: Verb = "grads",
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    stop: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Gate every contender, time those that are right, and return a result for each.

    When `stop` says yes before a round was finished, nothing is returned.
    """
    x, grad = case.operands(batch_size, dtype=dtype, device=device)
    verdicts, runs = {}, {}
    for name, make in makers.items():
        if stop():
            return []
        contender = make(case)
        verdicts[name] = check(contender, case, x, grad, verb)
        if verdicts[name].reason is None:
            runs[name] = partial(contender, x, grad)
    floor = partial(ordinary_gradient(case), x, grad)
    stopwatch = on_cuda if x.is_cuda else on_cpu
    measured = interleave(runs, floor, rounds=rounds, stopwatch=stopwatch, stop=stop)
    if runs and not measured:
        return []
    return [
        Result(case.name, batch_size, name, verdict.error, verdict.reason, measured.get(name))
        for name, verdict in verdicts.items()
    ]


def geometric_means(results: list[Result]) -> dict[str, tuple[float, int]]:
    """Geometric mean of the ratios by contender, and over how many cases; those without any left out."""
    logs: dict[str, list[float]] = {}
    for result in results:
        if result.measurement is not None:
            logs.setdefault(result.contender, []).append(log(result.measurement.ratio))
    return {name: (exp(sum(values) / len(values)), len(values)) for name, values in logs.items()}
