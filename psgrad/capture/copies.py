"""Every sample's own copy of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture.computed import Operand
from psgrad.layers import LayerRule

__all__ = ["Copies", "Record", "Use", "own_copies"]

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


class Copies:
    """Makes all samples' copies of parameters.

    Parameters
    ----------
    record, anchor
        As for `own_copies`.
    samples
        N.
    numbers
        If given, one of each sample: copies are told apart by noise of that number. Where a result of one
        sample moves as another's copy does, the gradient of that copy is not the other's alone.

    """

    SHARE = 0.1
    """Of the largest entry, that copies are told apart by."""

    def __init__(
        self, record: Record, samples: int, anchor: Tensor, numbers: Sequence[int] | None = None
    ) -> None:
        self.samples = samples
        self._record, self._anchor = record, anchor
        self._numbers = numbers

    def of(self, p: nn.Parameter) -> Tensor:
        """Return every sample's copy of a parameter, `[N, *shape]`."""
        return self.apart(own_copies(self._record, p, self.samples, self._anchor))

    def apart(self, copies: Tensor) -> Tensor:
        """Return copies `[N, *shape]`, told apart if they are to be."""
        if self._numbers is None:
            return copies
        shape, generator = copies.shape[1:], torch.Generator()
        noise = [torch.randn(shape, generator=generator.manual_seed(n)) for n in self._numbers]
        largest = copies.detach().abs().amax() if copies.numel() else copies.new_zeros(())
        return copies + self.SHARE * torch.where(largest > 0, largest, 1) * torch.stack(noise).to(copies)
