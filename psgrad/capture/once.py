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

__all__ = ["differentiable_once"]

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
            return tuple(None if t is None else _Refused.apply(t, *from_) for t in found)

        return once

    return decorated


class _Refused(torch.autograd.Function):
    """A gradient as it is, whose own is refused."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, *from_: Tensor) -> Tensor:
        return t.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise CaptureError(
            "the loss depends on a gradient through the model (torch.autograd.grad with create_graph=True: a "
            "gradient penalty, a physics-informed loss, an energy's forces), of which no per-sample gradient "
            "is captured. Compute every sample's with torch.func, vmap(grad(..)), or detach that gradient."
        )
