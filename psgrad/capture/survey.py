"""Which modules own the parameters of a model, and which models are refused, by module path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from psgrad.capture.shadow import is_shadowed, replaced_forward
from psgrad.capture.synchronised import why_synchronised
from psgrad.errors import RefusedModelError, ShapeError
from psgrad.layers import LayerRule, rule_for, why_samples_mix

__all__ = [
    "Layer",
    "OtherRowsError",
    "is_inside",
    "layers_of",
    "refuse_mixing",
    "refuse_model",
    "why_hooked",
    "why_not_shadowed",
]

OPAQUE = (nn.MultiheadAttention,)
"""Modules that use their children's parameters without calling the children."""


@dataclass(frozen=True)
class Layer:
    """A module that owns trainable parameters, and how it is captured.

    Attributes
    ----------
    path
        From the model, "" for the model itself.
    module
        The owner.
    rule
        Its rule; None for a region (`psgrad.capture.region`), which runs one sample at a time.
    parameters
        The module's own, by name; also while a region shows the module copies of them.

    """

    path: str
    module: nn.Module
    rule: LayerRule | None
    parameters: Mapping[str, nn.Parameter | None] = field(init=False)
    _all: tuple[nn.Parameter, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", self.module._parameters)
        object.__setattr__(self, "_all", tuple(self.module.parameters()))

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the module's own parameters to train."""
        return tuple(name for name, p in self.parameters.items() if p is not None and p.requires_grad)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train in it, also below."""
        return any(p.requires_grad for p in self._all)

    def __str__(self) -> str:
        return _named(self.path, self.module)


class OtherRowsError(ShapeError):
    """A layer whose axis 0 is not the batch."""

    def __init__(self, layer: Layer, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer = layer


def layers_of(module: nn.Module) -> list[Layer]:
    """Return every module that owns trainable parameters, once; regions before what they hold."""
    return list(_walk(module, "", set()))


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[Layer]:
    if module in seen:
        return
    seen.add(module)
    owns = any(p.requires_grad for p in module.parameters(recurse=False))
    rule = rule_for(module)
    uses_below = is_parametrized(module) or isinstance(module, OPAQUE)
    if owns or (uses_below and any(p.requires_grad for p in module.parameters())):
        yield Layer(path, module, rule)
    if rule is None and not is_parametrized(module):
        for name, child in module.named_children():
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def refuse_model(module: nn.Module, layers: list[Layer]) -> None:
    """Raise for a model that cannot be captured.

    Raises
    ------
    RefusedModelError
        If nothing is trainable, a parameter is lazy, complex or hooked, samples mix, a layer's settings allow
        no per-sample gradients, a module's class says so (a string `per_sample_refusal`), or a forward is
        shadowed already. All offenders are named.

    """
    if not layers:
        raise RefusedModelError(
            f"{type(module).__name__} has no trainable parameter: set requires_grad on those to train"
        )
    refuse_mixing(module)
    unfit = [f"{name}: {why}" for name, p in module.named_parameters() if (why := _why_unfit(p))]
    if unfit:
        raise RefusedModelError("no per-sample gradients for these parameters:\n  " + "\n  ".join(unfit))
    said = [
        f"{_named(path, m)}: {m.per_sample_refusal}"
        for path, m in module.named_modules()
        if isinstance(getattr(type(m), "per_sample_refusal", None), str)
    ]
    if said:
        raise RefusedModelError("no per-sample gradients for this model:\n  " + "\n  ".join(said))
    shadowed = [("", module), *((layer.path, layer.module) for layer in layers if layer.path)]
    reasons = [f"{_named(path, m)}: {why}" for path, m in shadowed if (why := why_not_shadowed(m))]
    reasons += [
        f"{layer}: its weight is computed by a hook before every forward (torch.nn.utils.weight_norm, "
        "spectral_norm, prune): use torch.nn.utils.parametrizations or torch.nn.utils.parametrize instead"
        for layer in layers
        if layer.rule and not is_parametrized(layer.module) and "weight" not in layer.parameters
    ]
    reasons += [
        f"{layer}: {why}" for layer in layers if layer.rule and (why := layer.rule.refusal(layer.module))
    ]
    if reasons:
        raise RefusedModelError("no per-sample gradients for this model:\n  " + "\n  ".join(reasons))


def _why_unfit(p: nn.Parameter) -> str | None:
    """Why a parameter has no per-sample gradients, wherever it is used, or None."""
    if is_lazy(p):
        return "it has no values yet: run the model once, before it is attached to"
    if not p.requires_grad:
        return None
    if p.is_meta:
        return "on the meta device, without values: give the module to_empty(device=...) and values first"
    if hasattr(p, "placements"):
        return (
            "a DTensor, of which each process holds a part (fully_shard, tensor parallelism), where a "
            "sample's gradient is of the whole: leave the model in one piece on every process"
        )
    if p.is_complex():
        return "complex, for which no norm is computed: train its real and imaginary part, or freeze it"
    return why_hooked(p)


def why_hooked(p: nn.Parameter) -> str | None:
    """Why hooks on a trainable parameter would be left out, or None; our own is not counted."""
    after = p._post_accumulate_grad_hooks or {}
    if not p._backward_hooks and all(hasattr(hook, "of_psgrad") for hook in after.values()):
        return None
    return (
        "it has hooks (register_hook, register_post_accumulate_grad_hook), which autograd calls and psgrad "
        "would not, as it computes this gradient itself. Remove them, and change p.grad after backward"
    )


def refuse_mixing(module: nn.Module) -> None:
    """Raise if a layer, in its present mode, makes rows of a batch depend on each other.

    Raises
    ------
    RefusedModelError
        Naming every such layer and what to use instead.

    """
    reasons = [
        f"{_named(path, m)} {why}" for path, m in module.named_modules() if (why := why_samples_mix(m))
    ]
    if reasons:
        raise RefusedModelError("layers that mix samples:\n  " + "\n  ".join(reasons))


def why_not_shadowed(module: nn.Module) -> str | None:
    """Why no handle can be attached to this very module, or None."""
    if is_shadowed(module):
        return "a psgrad handle is attached already; call its remove() first"
    if "_orig_mod" in module._modules:
        return "it is what torch.compile returned: give the module inside of it, model._orig_mod"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit compiled it, and its layers are not called one by one: give what it was made of"
    if (why := why_synchronised(module)) is not None:
        return why
    if replaced_forward(module) is None:
        return None
    return (
        "its forward was replaced on the instance, which no rule sees through: attach before it is "
        "(Accelerator.prepare does so for mixed precision)"
    )


def is_inside(path: str, other: str) -> bool:
    """Whether one module is inside of the other, by their paths."""
    return path != other and (not other or path.startswith(f"{other}."))


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the model itself'} ({type(module).__name__})"
