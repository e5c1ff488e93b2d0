"""Gradients that have none of their own.

What is captured runs on detached parameters, so that a gradient of its input, taken with create_graph,
does not know that it depends on them: what a gradient penalty wants of them would be left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from psgrad.errors import CaptureError

__all__ = ["differentiable_once", "refused"]

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(leads_to: Callable[[Any], Sequence[Tensor]]) -> Callable[[Backward], Backward]:
    """As torch's `once_differentiable`, also where nothing that a node's backward is given requires grad.

    Parameters
    ----------
    leads_to
        Of a node's context, tensors that require grad: a pass to one of them through the gradient is refused.

    """

    def decorated(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            from_ = [*leads_to(ctx), *(g for g in grads if g is not None)]
            return tuple(None if t is None else refused(OF_A_GRADIENT, t, *from_) for t in found)

        return once

    return decorated


OF_A_GRADIENT = (
    "the loss depends on a gradient through the model (torch.autograd.grad with create_graph=True: a "
    "gradient penalty, a physics-informed loss, an energy's forces), of which no per-sample gradient is "
    "captured. Compute every sample's with torch.func, vmap(grad(..)), or detach that gradient."
)


def refused(why: str, t: Tensor, *from_: Tensor) -> Tensor:
    """Return t, through which no backward pass comes to what it is from: a `CaptureError` says why."""
    return _Refused.apply(why, t, *from_)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, why: str, t: Tensor, *from_: Tensor) -> Tensor:
        ctx.why = why
        return t.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise CaptureError(ctx.why)
