"""One cell of the ensemble benchmark: K models at a batch size, every contender gated, then timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor

from psgrad.bench.ensemble_fits import Fit, Make, loop, ours, stock_vmap
from psgrad.bench.ensemble_models import MODELS, built
from psgrad.bench.gate import Verdict, raised
from psgrad.bench.process_memory import peak_of_steps
from psgrad.bench.timing import Measurement, interleave, on_cpu, on_cuda
from psgrad.bench.two_processes import PROCESSES, shares, two_processes
from psgrad.errors import RefusedModelError

__all__ = ["CLIPPED", "CONTENDERS", "LOOP", "Cell", "EnsembleResult", "measure_cell", "peak_memory"]

LOOP = "loop"
TOLERANCE = 1e-8
"""Largest difference after two steps in float64, of a member's parameters relative to their change."""
GATE_STEPS = 2
LEAST_ROUNDS = 5

CONTENDERS: dict[str, Make] = {
    "psgrad": ours,
    "loop, foreach": partial(loop, foreach=True),
    "loop, fused": partial(loop, fused=True),
    "vmap": stock_vmap,
    "two processes": two_processes,
}
CLIPPED: dict[str, Make] = {
    "loop, clipped": partial(loop, clip=True),
    "psgrad, clipped": partial(ours, clip=True),
}
"""Those that clip every sample of every member, by `psgrad.clip_per_sample`."""


@dataclass(frozen=True)
class Cell:
    """K members of a model of `MODELS`, with N samples each."""

    model: str
    members: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.model} K={self.members} N={self.batch_size}"


@dataclass(frozen=True)
class EnsembleResult:
    """One contender on one cell; its ratio is to the loop in the same round.

    Attributes
    ----------
    error
        After two steps in float64, the largest over members of `|found - truth| / |truth - start|`.
    reason
        Why there is no measurement, if there is none.
    memory, loop_memory
        Peak bytes of its training step and of the loop's; None where that was not measured.

    """

    cell: Cell
    contender: str
    error: float
    reason: str | None
    measurement: Measurement | None
    memory: int | None = None
    loop_memory: int | None = None


def measure_cell(
    cell: Cell,
    *,
    rounds: int,
    seconds: float = inf,
    seconds_each: float = inf,
    clipped: bool = False,
    memory: bool = False,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> list[EnsembleResult] | str:
    """Gate every contender over two steps in float64, time those that are right against the loop in float32.

    Who shares members out between processes takes part where there are enough of them.
    In float32 the loop itself may be off by a percent after two steps: a BatchNorm or a pooling amplifies.

    Parameters
    ----------
    cell
        What to measure.
    rounds
        At most, timed.
    seconds_each
        Of timing for a contender; it has five rounds whatever they take.
    seconds
        For the whole cell. A step that has begun is not cut off: what may be exceeded is one step, and one
        round. A cell whose gate alone would take longer, from the loop's first step, is not begun.
    clipped
        Also time those of `CLIPPED`.
    memory
        Also measure peak memory, while there is time.
    device
        "cpu" or "cuda".
    stop
        Asked before every contender and round.

    Returns
    -------
    list[EnsembleResult] | str
        Why nothing was measured, if not one round was finished.

    """
    end = time.monotonic() + seconds

    def over() -> str | None:
        if stop():
            return "stopped"
        return f"not done in {seconds:g} s" if time.monotonic() > end else None

    make = MODELS[cell.model][0]
    seeds = range(cell.members)
    x, y = _batch(cell, seeds, device)
    start = [[p.detach() for p in model.parameters()] for model in built(make, seeds, torch.float64, device)]
    contenders = _contenders(cell, clipped)
    truth = loop(built(make, seeds, torch.float64, device))
    began = time.monotonic()
    truth.step(x.double(), y)
    gate = (time.monotonic() - began) * GATE_STEPS * (1 + len(contenders))
    if gate > seconds:
        return f"the float64 check would take {gate:.0f} s of {seconds:g} s"
    for _ in range(GATE_STEPS - 1):
        truth.step(x.double(), y)
    truths = {False: truth}
    found: list[EnsembleResult] = []
    runs: dict[str, Callable[[], object]] = {}
    with ExitStack() as fits:
        for contender, maker in contenders.items():
            if (why := over()) is not None:
                return why
            clips = contender in CLIPPED
            if clips not in truths:
                found_truth = _clipped_truth(cell, x, y)
                if isinstance(found_truth, str):
                    found.append(EnsembleResult(cell, contender, float("nan"), found_truth, None))
                    continue
                truths[clips] = found_truth
            verdict = _verdict(maker, cell, x, y, truths[clips], start)
            if verdict.reason is None:
                fit = maker(built(make, seeds, torch.float32, device))
                fits.callback(fit.close)
                runs[contender] = partial(fit.step, x, y)
            found.append(EnsembleResult(cell, contender, verdict.error, verdict.reason, None))
        floor = loop(built(make, seeds, torch.float32, device))
        measured = interleave(
            runs,
            partial(floor.step, x, y),
            rounds=rounds,
            seconds_each=seconds_each,
            least_rounds=LEAST_ROUNDS,
            stopwatch=on_cuda if x.is_cuda else on_cpu,
            stop=lambda: over() is not None,
        )
    if runs and not measured:
        return over() or "stopped"
    found = [replace(result, measurement=measured.get(result.contender)) for result in found]
    return _with_memory(found, device, over, end) if memory else found


def peak_memory(cell: Cell, contender: str, *, device: str = "cpu", timeout: float = 120.0) -> int | None:
    """Peak bytes of a training step, in a process of its own.

    Of a contender with several processes it is the sum of theirs, each measured for itself; the interpreters
    and imports of all are counted for nobody.

    Parameters
    ----------
    cell, contender
        Which; the contender may be `LOOP`.
    device
        "cpu" or "cuda".
    timeout
        Seconds for a process.

    Returns
    -------
    int | None
        None if a process failed, was killed for its memory, or took too long.

    """
    shared_out = CONTENDERS.get(contender) is two_processes
    parts = shares(cell.members) if shared_out else [range(cell.members)]
    own = LOOP if shared_out else contender
    peaks = [
        peak_of_steps(
            partial(_step, cell, own, seeds, device), preload=__name__, device=device, timeout=timeout
        )
        for seeds in parts
    ]
    return sum(p for p in peaks if p is not None) if None not in peaks else None


def _contenders(cell: Cell, clipped: bool) -> dict[str, Make]:
    """Who can fit so many members."""
    makers = CONTENDERS | CLIPPED if clipped else CONTENDERS
    return {
        name: maker
        for name, maker in makers.items()
        if maker is not two_processes or cell.members >= PROCESSES
    }


def _clipped_truth(cell: Cell, x: Tensor, y: Tensor) -> Fit | str:
    """Return the clipping loop after its steps in float64, or why the model cannot be clipped."""
    models = built(MODELS[cell.model][0], range(cell.members), torch.float64, x.device.type)
    try:
        truth = loop(models, clip=True)
    except RefusedModelError as refused:
        return f"{type(refused).__name__}: {' '.join(str(refused).split())}"
    for _ in range(GATE_STEPS):
        truth.step(x.double(), y)
    return truth


def _with_memory(
    results: Iterable[EnsembleResult], device: str, over: Callable[[], str | None], end: float
) -> list[EnsembleResult]:
    """Measure the peak of everyone who was timed, until the time is over."""
    known: dict[str, int | None] = {}

    def peak(cell: Cell, contender: str) -> int | None:
        if contender not in known:
            left = min(120.0, end - time.monotonic())
            known[contender] = (
                None if over() else peak_memory(cell, contender, device=device, timeout=max(0.0, left))
            )
        return known[contender]

    return [
        replace(r, loop_memory=peak(r.cell, LOOP), memory=peak(r.cell, r.contender)) if r.measurement else r
        for r in results
    ]


def _step(cell: Cell, contender: str, seeds: range, device: str) -> Callable[[], object]:
    """Run in the child: build models of these seeds and their data, and return a step."""
    models = built(MODELS[cell.model][0], seeds, torch.float32, device)
    maker = loop if contender == LOOP else (CONTENDERS | CLIPPED)[contender]
    return partial(maker(models).step, *_batch(cell, seeds, device))


def _batch(cell: Cell, seeds: range, device: str) -> tuple[Tensor, Tensor]:
    """`x [K, N, ...]`, standard normal, and labels `[K, N]`."""
    generator = torch.Generator().manual_seed(seeds.start)
    shape = len(seeds), cell.batch_size
    x = torch.randn(*shape, *MODELS[cell.model][1], generator=generator)
    return x.to(device), torch.randint(10, shape, generator=generator).to(device)


def _verdict(maker: Make, cell: Cell, x: Tensor, y: Tensor, truth: Fit, start: list[list[Tensor]]) -> Verdict:
    """Whether a contender's members are, after steps in float64, where the loop's are."""
    seeds = range(cell.members)
    try:
        fit = maker(built(MODELS[cell.model][0], seeds, torch.float64, x.device.type))
        with ExitStack() as closing:
            closing.callback(fit.close)
            doubled = x.double()
            for _ in range(GATE_STEPS):
                fit.step(doubled, y)
            errors = [_error(fit.parameters(k), truth.parameters(k), start[k]) for k in seeds]
    except Exception as err:  # whatever a peer raises keeps it out of the table, not the others
        return raised(err)
    error = float(torch.tensor(errors).max())
    return Verdict(error, None if error <= TOLERANCE else f"wrong by {error:.1e}")


@torch.no_grad()
def _error(found: list[Tensor], truth: list[Tensor], start: list[Tensor]) -> float:
    """|found - truth| / |truth - start| over all parameters of a member."""
    off = torch.stack([(f - t).norm() for f, t in zip(found, truth, strict=True)]).norm()
    moved = torch.stack([(t - s).norm() for t, s in zip(truth, start, strict=True)]).norm()
    return float(off / moved)
