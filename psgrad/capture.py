"""Capture: a module's layers run so that `backward` hands over every parameter's contribution.

While a `Capture` is attached, each layer that owns trainable parameters runs as one autograd node
whose backward returns the gradient of the input only and hands (input, output gradient) over; the
ordinary weight gradient is not computed as well. In-place activations, residuals and any memory
layout are as free as without it, because the node's output is an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from psgrad.contribution import Contribution, KeptGrads, LayerUse
from psgrad.errors import CaptureError, ShapeError
from psgrad.layers import LayerCall, LayerRule
from psgrad.layers.fallback import run_per_sample
from psgrad.shadow import shadow_forward, unshadow_forward
from psgrad.survey import Layer, layers_of, refuse_mixing, refuse_model

__all__ = ["Capture", "Consumer"]


class Consumer(Protocol):
    """Who is told what a backward pass captured."""

    def add(self, contribution: Contribution) -> None:
        """Take one contribution, during backward, in the order in which backward reaches the layers."""

    def finish(self, samples: int) -> None:
        """Backward has ended and all N samples' contributions were added."""

    def abandon(self) -> None:
        """Backward ended in an error: drop what was added."""


class Capture:
    """Attach to `module` until `remove()` and tell `consumer` about every backward pass.

    Parameters
    ----------
    module
        Any module. It is changed in one way only: the `forward` of layers with trainable parameters
        is shadowed on the instance. A copy (`copy.deepcopy`, pickle) is free of the capture.
    consumer
        Is told.
    rows_per_sample
        K, the consecutive rows of the batch (axis 0 of every input) that make one sample.

    Raises
    ------
    RefusedModelError
        If samples would mix, if a layer has settings without per-sample gradients, if no parameter
        is trainable, or if a capture is attached already; all offenders are named.

    """

    def __init__(self, module: nn.Module, consumer: Consumer, rows_per_sample: int = 1) -> None:
        if rows_per_sample < 1:
            raise ShapeError(f"rows_per_sample must be at least 1, got {rows_per_sample}")
        self._module = module
        self._consumer = consumer
        self._rows_per_sample = rows_per_sample
        self._root_rows: int | None = None
        self._task: int | None = None
        self._seen: tuple[str, int] = ("", 0)
        # What makes every captured node part of the graph, also where nothing else requires grad.
        self._anchor = torch.zeros((), requires_grad=True)
        self._layers = layers_of(module)
        refuse_model(module, self._layers)
        self._trainable = frozenset(self.trainable)
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(_not_captured(name)) for name, p in self.trainable.items()
        ]
        for layer in self._layers:
            shadow_forward(layer.module, partial(self._run_layer, layer))
        shadow_forward(module, self._run_root)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The module's trainable parameters by path, each once."""
        return {name: p for name, p in self._module.named_parameters() if p.requires_grad}

    def remove(self) -> None:
        """Give the module back as it was. Twice is as good as once."""
        for handle in self._handles:
            handle.remove()
        for module in (self._module, *(layer.module for layer in self._layers)):
            unshadow_forward(module)
        self._handles.clear()
        self._layers.clear()

    def _run_root(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the whole module, knowing how many rows its batch has."""
        if torch.is_grad_enabled():
            refuse_mixing(self._module)
            self._check_trainable()
        self._root_rows = _first_rows(args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            self._root_rows = None  # a submodule called on its own may have another batch

    def _run_layer(self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one layer, captured if gradients are being recorded.

        Raises
        ------
        ShapeError
            If axis 0 of the layer's input is not the batch.

        """
        wanted = layer.wanted
        if not torch.is_grad_enabled() or not wanted:
            return forward(*args, **kwargs)
        if self._task is not None and torch._C._current_graph_task_id() == -1:
            self._abandon()  # no backward is running: the last one ended in an error
        if layer.rule is not None:
            return self._run_rule(layer, layer.rule, args, kwargs)

        def record(p: nn.Parameter, per_sample: Tensor) -> None:
            self._record(KeptGrads(layer.path, {p: per_sample}, per_sample.shape[0]))

        rows = self._root_rows if self._root_rows is not None else _first_rows(args, kwargs)
        if rows is None or rows % self._rows_per_sample:
            seen = "no input is a batch" if rows is None else f"{rows} rows"
            raise ShapeError(f"{layer}: {seen}, with rows_per_sample={self._rows_per_sample}")
        return run_per_sample(
            layer.path, layer.module, wanted, args, kwargs, rows, self._rows_per_sample, self._anchor, record
        )

    def _run_rule(self, layer: Layer, rule: LayerRule, args: Any, kwargs: Any) -> Tensor:
        x, *rest = args if args else (kwargs["input"],)
        error = rule.input_error(layer.module, x)
        if error is not None:
            raise ShapeError(f"{layer}: {error}; got {tuple(x.shape)}")
        rows = x.shape[0]
        if rows % self._rows_per_sample or self._root_rows not in (None, rows):
            expected = f"{self._root_rows} rows" if self._root_rows is not None else "rows"
            raise ShapeError(
                f"{layer} was called with {rows} rows, {tuple(x.shape)}: axis 0 must be the batch of the "
                f"model's input, {expected} with rows_per_sample={self._rows_per_sample}"
            )
        rest += [value for name, value in kwargs.items() if name != "input"]
        return _CapturedCall.apply(self, layer, rule, rest, self._anchor, x)

    def record_call(self, layer: Layer, rule: LayerRule, x: Tensor, g: Tensor) -> None:
        """Hand over one layer's input and output gradient, in backward."""
        call = LayerCall(layer.module, x, g, self._rows_per_sample, layer.wanted)
        self._record(LayerUse(layer.path, rule, call))

    def _record(self, contribution: Contribution) -> None:
        task = torch._C._current_graph_task_id()
        if self._task not in (None, task):
            self._abandon()
            raise CaptureError(
                f"{contribution.path!r}: backward reached this layer from inside another backward, or after "
                "one that failed. Use torch.utils.checkpoint with use_reentrant=False, or run the forward "
                "pass again."
            )
        if self._task is None:
            self._task = task
            self._seen = (contribution.path, contribution.samples)
            Variable._execution_engine.queue_callback(self._finish)
        path, samples = self._seen
        if contribution.samples != samples:
            raise ShapeError(
                f"one backward pass saw {samples} samples in {path!r} and {contribution.samples} in "
                f"{contribution.path!r}: all inputs of a backward pass need the same batch"
            )
        with torch.no_grad(), torch.autocast(self._device_type(contribution), enabled=False):
            self._consumer.add(contribution)

    @staticmethod
    def _device_type(contribution: Contribution) -> str:
        return contribution.parameters[0].device.type

    def _check_trainable(self) -> None:
        changed = self._trainable ^ self.trainable.keys()
        if changed:
            raise CaptureError(
                f"requires_grad has changed since psgrad was attached, of {', '.join(sorted(changed))}: "
                "remove() the handle and attach a new one"
            )

    def _abandon(self) -> None:
        self._task = None
        self._consumer.abandon()

    def _finish(self) -> None:
        self._task = None
        self._check_trainable()
        with torch.no_grad():
            self._consumer.finish(self._seen[1])


class _CapturedCall(torch.autograd.Function):
    """One call of a layer with a rule: backward gives the input's gradient and records."""

    @staticmethod
    def forward(
        ctx: Any, capture: Capture, layer: Layer, rule: LayerRule, rest: list[Any], anchor: Tensor, x: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        needs_x = ctx.needs_input_grad[5]
        params = {name: None if p is None else p.detach() for name, p in layer.module._parameters.items()}
        with torch.set_grad_enabled(needs_x):
            inner_x = x.detach().requires_grad_(needs_x)
            out = rule.forward(layer.module, params, inner_x, *rest)
        ctx.save_for_backward(x)
        ctx.record = lambda x, g: capture.record_call(layer, rule, x, g)
        ctx.path = layer.path
        ctx.inner = (inner_x, out if needs_x else None)
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
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


def _not_captured(name: str) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        raise CaptureError(
            f"parameter {name!r} got an ordinary gradient: it was used outside of the module that owns it, "
            "where no per-sample gradient could be captured. Use it inside that module's forward, or freeze "
            "it; a penalty on weights belongs in the optimizer (weight_decay)."
        )

    return hook


def _first_rows(args: Any, kwargs: Any) -> int | None:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    return None
