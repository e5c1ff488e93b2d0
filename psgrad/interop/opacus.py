"""Opacus's own `GradSampleModule` computes convolutions with psgrad: gradients, norms, clipped sums.

Opacus asks two tables what a layer's per-sample gradients and their norms are, at every backward pass.
While installed, psgrad's functions stand there, for transposed convolutions too, which Opacus has not. In
ghost mode the first backward pass also holds what a clipped sum needs, and the second one leaves those
parameters out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from opacus.grad_sample import (
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from psgrad.capture.contribution import Contribution, LayerUse
from psgrad.errors import ConfigError, ShapeError
from psgrad.graph import leaves_of
from psgrad.layers import RULES, LayerCall
from psgrad.per_sample import accumulate

__all__ = ["CONVOLUTIONS", "EVERY_LAYER", "install", "installed", "uninstall", "use"]

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""What `install` takes over unless told otherwise."""

EVERY_LAYER: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""All that psgrad can take over: in a model of these alone, ghost clipping needs one backward pass."""

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]

_MISSING: Any = object()
_replaced: dict[type[nn.Module], tuple[Any, Any]] = {}  # type -> Opacus's own two entries, or _MISSING
_holding: dict[nn.Module, list[Contribution]] = {}  # layer -> where its clipped sum is to be found
_opacus_backward = DPTensorFastGradientClipping.backward
_opacus_rearrange = GradSampleHooks.rearrange_grad_samples
_BATCH_IN_FRONT = (*CONVOLUTIONS, nn.GroupNorm)


def install(layers: Collection[type[nn.Module]] = CONVOLUTIONS) -> None:
    """Let Opacus compute these layers with psgrad, from the next backward pass on, until `uninstall`.

    A second call with the same layers changes nothing. Modules that Opacus wrapped before take part at
    once, because Opacus looks into its tables at every backward pass.

    Parameters
    ----------
    layers
        Some of `EVERY_LAYER`. As everywhere in Opacus, subclasses do not count.

    Guarantees
    ----------
    `p.grad_sample` (grad sample modes "hooks" and fast gradient clipping), the norms and `p.grad` (mode
    "ghost") of these layers are those of the one-sample-at-a-time loop: for every `padding_mode`, stride,
    dilation, number of groups and memory layout. Axis 0 of a convolution's input is its batch, whatever
    `batch_first` says. Modes "functorch" and "ew" do not ask the tables and are as they were.

    Raises
    ------
    ConfigError
        If a layer is none of `EVERY_LAYER`.

    """
    unknown = [layer.__name__ for layer in layers if layer not in EVERY_LAYER]
    if unknown:
        known = ", ".join(layer.__name__ for layer in EVERY_LAYER)
        raise ConfigError(f"psgrad takes over {known} in Opacus, not {', '.join(unknown)}")
    grad_samplers, norm_samplers = _tables()
    for layer in layers:
        if layer in _replaced:
            continue
        _replaced[layer] = (grad_samplers.get(layer, _MISSING), norm_samplers.get(layer, _MISSING))
        grad_samplers[layer], norm_samplers[layer] = _grads, _norms
    _set_methods()


def uninstall(layers: Collection[type[nn.Module]] = EVERY_LAYER) -> None:
    """Put Opacus's own entries back; those that somebody else has put there since `install` stay.

    Parameters
    ----------
    layers
        Those that Opacus gets back. One that is not installed is passed over.

    """
    grad_samplers, norm_samplers = _tables()
    for layer in layers:
        grads, norms = _replaced.pop(layer, (None, None))
        _put_back(grad_samplers, layer, _grads, grads)
        _put_back(norm_samplers, layer, _norms, norms)
    _set_methods()


@contextmanager
def use(layers: Collection[type[nn.Module]] = CONVOLUTIONS) -> Iterator[None]:
    """`install` with an end: on exit, also by an exception, what this call has installed is removed.

    The parameter and the errors are those of `install`.
    """
    before = installed()
    install(layers)
    try:
        yield
    finally:
        uninstall([layer for layer in layers if layer not in before])


def installed() -> frozenset[type[nn.Module]]:
    """Return the layers that Opacus computes with psgrad now."""
    return frozenset(_replaced)


def _tables() -> tuple[dict[type[nn.Module], Any], dict[type[nn.Module], Any]]:
    """Return Opacus's tables: of per-sample gradients, which its modes share, and of their norms."""
    return GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.NORM_SAMPLERS


def _put_back(table: dict[type[nn.Module], Any], layer: type[nn.Module], ours: Any, theirs: Any) -> None:
    if table.get(layer) is not ours:
        return
    if theirs is _MISSING:
        del table[layer]
    else:
        table[layer] = theirs


def _set_methods() -> None:
    """Have two of Opacus's methods be psgrad's while any layer is."""
    DPTensorFastGradientClipping.backward = _clipped_backward if _replaced else _opacus_backward
    GradSampleHooks.rearrange_grad_samples = _rearrange if _replaced else _opacus_rearrange


def _use_of(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> LayerUse:
    """Return one call of a layer. Opacus has undone the 1/N of a mean loss: backprops is per sample.

    Raises
    ------
    ShapeError
        If the input is no batch.

    """
    rule = RULES[type(layer)]
    x = activations[0]
    error = rule.input_error(layer, x)
    if error is not None:
        raise ShapeError(f"{layer}: {error}")
    wanted = tuple(name for name, p in layer.named_parameters(recurse=False) if p.requires_grad)
    return LayerUse(str(layer), rule, LayerCall(layer, x, backprops, 1, wanted))


def _grads(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """`[N, *p.shape]` of every trainable parameter: an entry of Opacus's table."""
    return _use_of(layer, activations, backprops).grads()


def _norms(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """`[N]` norms of every trainable parameter: an entry of Opacus's table."""
    contribution: Contribution = _use_of(layer, activations, backprops)
    held = _holding.get(layer)
    if held is not None:
        contribution = contribution.kept()  # written out where that is cheaper for norm and sum together
        held.append(contribution)
    return {p: sq_norms.sqrt() for p, sq_norms in contribution.sq_norms().items()}


@wraps(_opacus_rearrange)
def _rearrange(self: Any, *, module: nn.Module, batch_first: bool, **others: Any) -> Any:
    # Opacus moves axis 1 to the front in a model that has its batch there. These layers never have.
    batch_first = batch_first or (type(module) in _BATCH_IN_FRONT and type(module) in _replaced)
    return _opacus_rearrange(self, module=module, batch_first=batch_first, **others)


@wraps(_opacus_backward)
def _clipped_backward(self: Any) -> None:
    # The sharded variants keep their parameters' gradients elsewhere, and DDP waits for autograd's.
    engine, losses = self.module, self.loss_per_sample
    plain = (GradSampleHooksFastGradientClipping, GradSampleModuleFastGradientClipping)
    if (
        type(engine) not in plain
        or isinstance(engine._module, DistributedDataParallel)
        or self.loss_reduction not in ("mean", "sum")
    ):
        return _opacus_backward(self)
    held: list[Contribution] = []
    layers = [layer for layer in engine._module.modules() if type(layer) in _replaced]
    _holding.update(dict.fromkeys(layers, held))
    try:
        loss = losses.mean(0) if self.loss_reduction == "mean" else losses.sum(0)
        loss.backward(retain_graph=True)
    finally:
        for layer in layers:
            _holding.pop(layer, None)
    self.optimizer.zero_grad()
    factors = engine.get_clipping_coef()
    # Who listens to the gradients of a parameter hears them from autograd.
    summed = [c for c in held if not any(_has_hooks(p) for p in c.parameters)]
    done = {p for c in summed for p in c.parameters}
    rest = [leaf for leaf in leaves_of([losses]) if leaf not in done]
    if rest:
        engine.disable_hooks()
        try:
            (factors.to(losses.device) * losses).sum().backward(inputs=rest)
        finally:
            engine.enable_hooks()
    for contribution in summed:
        on_device = factors.to(contribution.parameters[0].device)
        for p, total in contribution.weighted_sum(on_device).items():
            accumulate(p, total)
    return None


def _has_hooks(p: nn.Parameter) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)
