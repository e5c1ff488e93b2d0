"""One call of a layer with a rule, as one autograd node that records what its backward sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from psgrad.errors import CaptureError
from psgrad.layers import LayerRule
from psgrad.survey import Layer

__all__ = ["CapturedCall"]


class CapturedCall(torch.autograd.Function):
    """`apply(record, layer, rule, rest, anchor, x)`: the layer's output.

    In backward, `record(x, g)` is called with the layer's input and its output's gradient; only the
    gradient of x is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        record: Callable[[Tensor, Tensor], None],
        layer: Layer,
        rule: LayerRule,
        rest: list[Any],
        anchor: Tensor,
        x: Tensor,
    ) -> Tensor:
        """Run the layer; its own graph, for the input's gradient, is kept apart."""
        ctx.set_materialize_grads(False)
        needs_x = ctx.needs_input_grad[5]
        params = {name: None if p is None else p.detach() for name, p in layer.parameters.items()}
        with torch.set_grad_enabled(needs_x):
            inner_x = x.detach().requires_grad_(needs_x)
            out = rule.forward(layer.module, params, inner_x, *rest)
        ctx.save_for_backward(x)
        ctx.record = record
        ctx.path = layer.path
        ctx.inner = (inner_x, out if needs_x else None)
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """Record, and return the input's gradient if it is asked for.

        Raises
        ------
        CaptureError
            In a second backward pass through the same forward pass.

        """
        nothing = (None, None, None, None, None)
        if g is None:
            return (*nothing, None)
        if ctx.inner is None:
            raise CaptureError(
                f"{ctx.path!r}: a second backward pass through the same forward pass; psgrad frees a layer's "
                "inner graph after the first. Run the forward pass again, or add up the losses first."
            )
        (inner_x, out), ctx.inner = ctx.inner, None
        (x,) = ctx.saved_tensors
        ctx.record(x.detach(), g)
        return (*nothing, None if out is None else torch.autograd.grad(out, inner_x, g)[0])
