"""Every sample's own copy of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture.computed import Operand
from psgrad.layers import LayerRule

__all__ = ["Record", "Use", "own_copies"]

Record = Callable[[nn.Parameter, Tensor], None]
"""Takes a parameter's gradient `[N, *shape]`."""
Use = Callable[[LayerRule, nn.Module, Operand, Operand, Tensor], Tensor]
"""Computes and captures what a rule says of a layer with these settings, weight and bias."""


def own_copies(record: Record, p: nn.Parameter, samples: int, anchor: Tensor) -> Tensor:
    """Expand p to `[N, *shape]`; in backward, call `record(p, gradient)`, once, instead of summing it.

    `anchor` is a scalar that requires grad.
    """
    return _Expand.apply(p.detach(), samples, anchor, partial(record, p))


class _Expand(torch.autograd.Function):
    """`[*shape] -> [N, *shape]`."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, samples: int, anchor: Tensor, hand_over: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.hand_over = hand_over
        return p.detach().expand(samples, *p.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None, None]:
        if grad is not None:
            ctx.hand_over(grad)
        return None, None, None, None
