"""One row of the ensemble benchmark: K models at a batch size, every contender gated, then timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from psgrad.bench.gate import Verdict
from psgrad.bench.timing import Measurement, interleave, on_cpu, on_cuda
from psgrad.ensemble import SGD, Ensemble

__all__ = ["CONTENDERS", "LOOP", "EnsembleResult", "measure_ensemble"]

LOOP = "loop"
TOLERANCE = 1e-8
"""Largest difference after two steps in float64, of a member's parameters relative to their change."""
RATE, MOMENTUM = 0.01, 0.9

Step = Callable[[Tensor, Tensor], None]
Parameters = Callable[[int], list[Tensor]]
"""Member k's parameters as they are now."""


@dataclass(frozen=True)
class EnsembleResult:
    """One contender on one model, K and N; its ratio is to the loop in the same round."""

    model: str
    members: int
    batch_size: int
    contender: str
    error: float
    reason: str | None
    measurement: Measurement | None


def loop(models: list[nn.Module], **implementation: bool) -> tuple[Step, Parameters]:
    """Plain PyTorch, member after member, with an implementation of its SGD."""
    optimizers = [torch.optim.SGD(m.parameters(), RATE, MOMENTUM, **implementation) for m in models]

    def step(x: Tensor, y: Tensor) -> None:
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[k]), y[k]).backward()
            optimizer.step()

    return step, lambda k: list(models[k].parameters())


def ours(models: list[nn.Module]) -> tuple[Step, Parameters]:
    """`psgrad.ensemble` with its own optimizer."""
    ens = Ensemble.from_modules(models)
    optimizer = SGD(ens.parameters(), RATE, MOMENTUM)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        ens.loss(F.cross_entropy, x, y, own=True).sum().backward()
        optimizer.step()

    return step, lambda k: [p[k] for p in ens.parameters()]


def stock_vmap(models: list[nn.Module]) -> tuple[Step, Parameters]:
    """`torch.func`: stacked state, `vmap` of `grad`, torch's SGD over the stacked parameters."""
    state: Any = stack_module_state(models)
    parameters, buffers = state
    optimizer = torch.optim.SGD(parameters.values(), RATE, MOMENTUM)

    def loss(own: dict[str, Tensor], buffer: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], (own, buffer), (x,)), y)

    gradients = vmap(grad(loss))

    def step(x: Tensor, y: Tensor) -> None:
        found = gradients({n: p.detach() for n, p in parameters.items()}, buffers, x, y)
        for name, p in parameters.items():
            p.grad = found[name]
        optimizer.step()

    return step, lambda k: [p[k] for p in parameters.values()]


CONTENDERS: dict[str, Callable[[list[nn.Module]], tuple[Step, Parameters]]] = {
    "psgrad": ours,
    "loop, foreach": lambda models: loop(models, foreach=True),
    "loop, fused": lambda models: loop(models, fused=True),
    "vmap": stock_vmap,
}


def measure_ensemble(
    name: str,
    make: Callable[[], nn.Module],
    image: tuple[int, ...],
    members: int,
    batch_size: int,
    *,
    rounds: int,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> list[EnsembleResult]:
    """Gate every contender over two steps in float64, time those that are right against the loop in float32.

    In float32 the loop itself may be off by a percent after two steps: a BatchNorm or a pooling amplifies.

    Empty when `stop` said yes before a round was finished.
    """

    def built(dtype: torch.dtype) -> list[nn.Module]:
        models: list[nn.Module] = []
        for k in range(members):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(k)
                models.append(make().to(device, dtype))
        return models

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(members, batch_size, *image, generator=generator).to(device)
    y = torch.randint(10, (members, batch_size), generator=generator).to(device)
    start = [[p.detach() for p in model.parameters()] for model in built(torch.float64)]
    truth_step, truth = loop(built(torch.float64))
    for _ in range(2):
        truth_step(x.double(), y)
    verdicts: dict[str, Verdict] = {}
    runs: dict[str, Callable[[], object]] = {}
    for contender, maker in CONTENDERS.items():
        if stop():
            return []
        try:
            step, parameters = maker(built(torch.float64))
            for _ in range(2):
                step(x.double(), y)
            error = float(
                torch.tensor([_error(parameters(k), truth(k), start[k]) for k in range(members)]).max()
            )
            verdicts[contender] = Verdict(error, None if error <= TOLERANCE else f"wrong by {error:.1e}")
        except Exception as err:  # whatever a peer raises keeps it out of the table, not the others
            verdicts[contender] = Verdict(float("nan"), f"{type(err).__name__}: {str(err).splitlines()[:1]}")
        if verdicts[contender].reason is None:
            runs[contender] = partial(maker(built(torch.float32))[0], x, y)
    floor, _ = loop(built(torch.float32))
    watch = on_cuda if x.is_cuda else on_cpu
    measured = interleave(runs, partial(floor, x, y), rounds=rounds, stopwatch=watch, stop=stop)
    if runs and not measured:
        return []
    return [
        EnsembleResult(name, members, batch_size, who, v.error, v.reason, measured.get(who))
        for who, v in verdicts.items()
    ]


@torch.no_grad()
def _error(found: list[Tensor], truth: list[Tensor], start: list[Tensor]) -> float:
    """|found - truth| / |truth - start| over all parameters of a member."""
    off = torch.stack([(f - t).norm() for f, t in zip(found, truth, strict=True)]).norm()
    moved = torch.stack([(t - s).norm() for t, s in zip(truth, start, strict=True)]).norm()
    return float(off / moved)
