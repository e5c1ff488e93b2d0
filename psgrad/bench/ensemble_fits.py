"""Ways of fitting K models in one process: psgrad, plain loops, stock vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from psgrad.clipping import ClipPerSample, clip_per_sample
from psgrad.ensemble import SGD, Ensemble

__all__ = ["Fit", "Make", "loop", "ours", "stock_vmap"]

RATE, MOMENTUM = 0.01, 0.9
MAX_NORM = 1.0
"""C, where samples are clipped."""


@dataclass(frozen=True)
class Fit:
    """K models that are being fitted.

    Attributes
    ----------
    step
        A training step on `x [K, N, ...]` and labels `y [K, N]`.
    parameters
        Member k's as they are now.
    close
        Ends what was started for it.

    """

    step: Callable[[Tensor, Tensor], None]
    parameters: Callable[[int], list[Tensor]]
    close: Callable[[], None] = lambda: None


Make = Callable[[Sequence[nn.Module]], Fit]
"""From K models of the same class, which it may change."""


def loop(models: Sequence[nn.Module], *, clip: bool = False, **implementation: bool) -> Fit:
    """Plain PyTorch, member after member, with an implementation of its SGD; clipping is psgrad's."""
    handles = [clip_per_sample(model, MAX_NORM) for model in models] if clip else []
    optimizers = [torch.optim.SGD(m.parameters(), RATE, MOMENTUM, **implementation) for m in models]

    def step(x: Tensor, y: Tensor) -> None:
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[k]), y[k]).backward()
            optimizer.step()

    return Fit(step, lambda k: list(models[k].parameters()), lambda: _remove(handles))


def ours(models: Sequence[nn.Module], *, clip: bool = False) -> Fit:
    """`psgrad.ensemble` with its own optimizer, every member's samples clipped or not."""
    ens = Ensemble.from_modules(models)
    handles = [clip_per_sample(ens, MAX_NORM)] if clip else []
    optimizer = SGD(ens.parameters(), RATE, MOMENTUM)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        ens.loss(F.cross_entropy, x, y, own=True).sum().backward()
        optimizer.step()

    return Fit(step, lambda k: [p[k] for p in ens.parameters()], lambda: _remove(handles))


def _remove(handles: Sequence[ClipPerSample]) -> None:
    for handle in handles:
        handle.remove()


def stock_vmap(models: Sequence[nn.Module]) -> Fit:
    """`torch.func`: stacked state, `vmap` of `grad`, torch's SGD over the stacked parameters."""
    state: Any = stack_module_state(list(models))
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

    return Fit(step, lambda k: [p[k] for p in parameters.values()])
