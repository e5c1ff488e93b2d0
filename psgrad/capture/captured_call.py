"""One call of a layer with a rule, recorded: its input, and in backward the gradient of its output.

The layer runs on detached parameters, so that autograd computes the gradient of its input and nothing
else; one node after it passes the gradient of the output on as it is, and tells. Or a rule computes the
input's gradient together with its own, in one node that tells as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture.once import differentiable_once
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
    if not rest and rule.has_own_backward(layer.module, x):
        once = _once(record, layer.path)
        return _Computed.apply(once, rule, layer.module, tuple(params), anchor, x, *params.values())
    return told(record, layer.path, anchor, x, rule.forward(layer.module, params, x, *rest))


def told(record: Callable[..., None], path: str, anchor: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """`out`, which a layer at `path` computed from x on detached parameters; as for `captured_call`."""
    return _Told.apply(_once(record, path), anchor, x, out)


def _once(record: Callable[..., None], path: str) -> Callable[..., None]:
    """`record`, or what refuses where a checkpoint runs the layer again, in backward."""
    return record if torch._C._current_graph_task_id() == -1 else partial(_refuse, path)


def _refuse(path: str, *_: Tensor) -> None:
    raise CaptureError(
        f"{path!r}: this layer's forward ran inside of a backward pass, and now has one of its own: "
        "a sample's gradient would be told in parts. Use torch.utils.checkpoint with use_reentrant=False."
    )


class _Told(torch.autograd.Function):
    """`out` as it is."""

    @staticmethod
    def forward(ctx: Any, record: Callable[..., None], anchor: Tensor, x: Tensor, out: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.record, ctx.anchor = record, anchor
        return out.detach()  # no view: what follows may write to it in place

    @staticmethod
    @differentiable_once(lambda ctx: [ctx.anchor])
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if g is not None:
            ctx.record(x.detach(), g)
        return None, None, None, g


class _Computed(torch.autograd.Function):
    """A layer whose rule computes the gradient of x as well."""

    @staticmethod
    def forward(
        ctx: Any,
        record: Callable[..., None],
        rule: LayerRule,
        module: nn.Module,
        names: tuple[str, ...],
        anchor: Tensor,
        x: Tensor,
        *params: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        out, saved = rule.forward_saving(module, dict(zip(names, params, strict=True)), x)
        ctx.save_for_backward(x, *params, *saved)
        ctx.record, ctx.rule, ctx.module, ctx.names = record, rule, module, names
        ctx.anchor = anchor
        return out

    @staticmethod
    @differentiable_once(lambda ctx: [ctx.anchor, ctx.saved_tensors[0]])
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        to_x = None
        if g is not None:
            params = dict(zip(ctx.names, others, strict=False))
            saved = tuple(others[len(params) :])
            to_input = ctx.needs_input_grad[5]
            x = x.detach()
            to_x, computed = ctx.rule.own_backward(ctx.module, params, x, saved, g, to_input=to_input)
            ctx.record(x, g, *computed)
        return None, None, None, None, None, to_x, *(None for _ in ctx.names)
