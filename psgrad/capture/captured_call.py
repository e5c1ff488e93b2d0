"""One call of a layer with a rule, recorded: its input, and in backward the gradient of its output.

The layer runs on detached parameters, so that autograd computes the gradient of its input and nothing
else; one node after it passes the gradient of the output on as it is, and tells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from psgrad.capture.survey import Layer
from psgrad.errors import CaptureError
from psgrad.layers import LayerRule

__all__ = ["captured_call", "told"]


def captured_call(
    record: Callable[..., None],
    layer: Layer,
    rule: LayerRule,
    rest: list[Any],
    anchor: Tensor,
    x: Tensor,
) -> Tensor:
    """Run `layer` on x and `rest`; in backward, call `record(x, g, *saved)` with its output's gradient g.

    `anchor` is a scalar that requires grad: it makes the call part of the graph where x does not.
    """
    params = {name: None if p is None else p.detach() for name, p in layer.parameters.items()}
    out, saved = rule.forward_saving(layer.module, params, x, *rest)
    return told(record, layer.path, anchor, x, out, *saved)


def told(
    record: Callable[..., None], path: str, anchor: Tensor, x: Tensor, out: Tensor, *saved: Tensor
) -> Tensor:
    """`out`, which a layer at `path` computed from x on detached parameters; as for `captured_call`."""
    if torch._C._current_graph_task_id() != -1:  # a checkpoint runs the layer again, in backward
        record = partial(_refuse, path)
    return _Told.apply(record, anchor, x, out, *saved)


def _refuse(path: str, *_: Tensor) -> None:
    raise CaptureError(
        f"{path!r}: this layer's forward ran inside of a backward pass, and now has one of its own: "
        "a sample's gradient would be told in parts. Use torch.utils.checkpoint with use_reentrant=False."
    )


class _Told(torch.autograd.Function):
    """`out` as it is."""

    @staticmethod
    def forward(
        ctx: Any, record: Callable[..., None], anchor: Tensor, x: Tensor, out: Tensor, *saved: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *saved)
        ctx.record = record
        return out.detach()  # no view: what follows may write to it in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        if g is not None:
            ctx.record(x.detach(), g, *saved)
        return None, None, None, g, *(None for _ in saved)
