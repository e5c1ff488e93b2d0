"""One row of the step benchmark: a model at a batch size, every contender gated, then timed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.bench.gate import Verdict, raised
from psgrad.bench.step_models import StepModel
from psgrad.bench.step_peers import NonPrivate, Stepper, StepperMaker, written_bytes
from psgrad.bench.sweep import Result
from psgrad.bench.tf32 import tf32
from psgrad.bench.timing import interleave, on_cpu, on_cuda

__all__ = ["Reference", "StepResult", "check", "measure_step", "reference"]

TOLERANCE = 1e-3
"""Largest error of float32 that is taken for rounding: of a parameter's gradient, relative to its norm."""


@dataclass(frozen=True)
class StepResult(Result):
    """One contender on one model and batch size.

    Attributes
    ----------
    memory
        Peak memory of a step over that of the non-private step, or None if not measured.
    largest_batch
        Largest batch whose step fits the memory budget, or None if not searched.

    """

    memory: float | None = None
    largest_batch: int | None = None


@dataclass(frozen=True)
class Reference:
    """The truth: float64, one sample at a time, on the CPU.

    Attributes
    ----------
    max_norm
        C, the median of the norms: half of the samples are clipped.
    norms
        `[N]` norms of the samples' gradients.
    clipped, ordinary
        The mean of the clipped and of the unclipped gradients, for each parameter.

    """

    max_norm: float
    norms: Tensor
    clipped: list[Tensor]
    ordinary: list[Tensor]


def reference(model: nn.Module, x: Tensor, y: Tensor) -> Reference:
    """Compute the truth with an ordinary backward pass for every sample, twice over: C comes first."""
    model = NonPrivate(model).model.cpu().double()
    x, y = x.cpu().double(), y.cpu()
    parameters = list(model.parameters())

    def grads_of(n: int) -> list[Tensor]:
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        return list(torch.autograd.grad(loss, parameters))

    def norm(grads: list[Tensor]) -> Tensor:
        return torch.stack([grad.norm() for grad in grads]).norm()

    norms = torch.stack([norm(grads_of(n)) for n in range(len(x))])
    max_norm = float(norms.median())
    clipped = [torch.zeros_like(p) for p in parameters]
    ordinary = [torch.zeros_like(p) for p in parameters]
    for n in range(len(x)):
        factor = float((max_norm / norms[n]).clamp(max=1)) / len(x)
        for i, grad in enumerate(grads_of(n)):
            clipped[i].add_(grad, alpha=factor)
            ordinary[i].add_(grad, alpha=1 / len(x))
    return Reference(max_norm, norms, clipped, ordinary)


def check(stepper: Stepper, truth: Reference, x: Tensor, y: Tensor) -> Verdict:
    """Run `gradient` once and compare every parameter's, and the norms of those that give them.

    The error is the largest of |difference| / |truth|; a gradient that is next to nothing, as that of a
    bias before a normalisation, counts as a hundredth of the root mean square of all.
    """
    stepper.gradient(x, y)
    expected = truth.clipped if stepper.clips else truth.ordinary
    actual = [p.grad for p in stepper.model.parameters()]
    least = 0.01 * torch.stack([e.norm() for e in expected]).square().mean().sqrt()
    errors = []
    for (name, _), a, e in zip(stepper.model.named_parameters(), actual, expected, strict=True):
        if a is None:
            return Verdict(float("nan"), f"no gradient of {name}")
        errors.append(float((a.detach().cpu().double() - e).norm() / torch.maximum(e.norm(), least)))
    norms = stepper.norms()
    if norms is not None:
        errors.append(float(((norms.cpu().double() - truth.norms) / truth.norms).abs().max()))
    worst = max(errors) if all(error < float("inf") for error in errors) else float("inf")
    if worst == float("inf"):
        return Verdict(worst, "not finite")
    return Verdict(worst, f"wrong by {worst:.1%}" if worst > TOLERANCE else None)


def measure_step(
    name: str,
    model: StepModel,
    batch_size: int,
    makers: Mapping[str, StepperMaker],
    *,
    rounds: int,
    seconds: float = float("inf"),
    memory_limit: float = float("inf"),
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> list[StepResult]:
    """Gate every contender, time those that are right against the non-private step.

    Parameters
    ----------
    name, model, batch_size
        What is trained.
    makers
        Contenders by name.
    rounds
        Most rounds.
    seconds
        After so long no round begins, once there are three.
    memory_limit
        Bytes. Whoever would hold more than half of it in per-sample gradients is not run.
    device
        "cpu" or "cuda".
    stop
        Asked between contenders and before every round.

    Returns
    -------
    list[StepResult]
        One for each contender; empty when `stop` said yes before a round was finished.

    """
    net = model.seeded().to(device)
    x, y = (t.to(device) for t in model.batch(batch_size))
    truth = reference(net, x, y)
    verdicts: dict[str, Verdict] = {}
    runs = {}
    for contender, make in makers.items():
        if stop():
            return []
        held = written_bytes(make, net, batch_size)
        if 2 * held > memory_limit:
            reason = f"not run: {held / 2**30:.1f} GiB of per-sample gradients"
            verdicts[contender] = Verdict(float("nan"), reason)
            continue
        stepper, verdicts[contender] = _gated(make, net, truth, x, y)
        if stepper is not None:
            runs[contender] = partial(stepper.step, x, y)
    floor = NonPrivate(net)
    measured = interleave(
        runs,
        partial(floor.step, x, y),
        rounds=rounds,
        stopwatch=on_cuda if x.is_cuda else on_cpu,
        stop=_Patience(seconds, stop),
    )
    if runs and not measured:
        return []
    return [
        StepResult(name, batch_size, contender, verdict.error, verdict.reason, measured.get(contender))
        for contender, verdict in verdicts.items()
    ]


class _Patience:
    """Says stop when asked to, or after so many seconds if three rounds are done."""

    def __init__(self, seconds: float, stop: Callable[[], bool]) -> None:
        self.seconds, self.stop = seconds, stop
        self.rounds, self.start = 0, time.monotonic()

    def __call__(self) -> bool:
        enough = self.rounds >= 3 and time.monotonic() - self.start > self.seconds
        self.rounds += 1
        return enough or self.stop()


def _gated(
    make: StepperMaker, net: nn.Module, truth: Reference, x: Tensor, y: Tensor
) -> tuple[Stepper | None, Verdict]:
    """Return a contender that is right, ready for its first step, or None; and the verdict."""
    try:
        stepper = make(net, truth.max_norm, len(x))
        with tf32(False):  # whose rounding is as large as errors that are to be seen; timed steps may use it
            verdict = check(stepper, truth, x, y)
        if verdict.reason is None:
            stepper.update()
            return stepper, verdict
    except Exception as err:  # whatever a peer raises keeps it out of the table, not the others
        verdict = raised(err)
    gc.collect()
    return None, verdict
