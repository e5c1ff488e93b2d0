"""Which modules own the parameters of a model, and which models are refused, by module path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from psgrad.errors import RefusedModelError
from psgrad.layers import LayerRule, rule_for, why_samples_mix
from psgrad.shadow import ShadowForward

__all__ = ["Layer", "layers_of", "refuse_mixing", "refuse_model"]

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
        Its rule; None where `torch.func` takes the module and all its children.

    """

    path: str
    module: nn.Module
    rule: LayerRule | None

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the parameters to train, with a rule the module's own, else its children's too."""
        named = self.module.named_parameters(recurse=self.rule is None)
        return tuple(name for name, p in named if p.requires_grad)

    def __str__(self) -> str:
        return _named(self.path, self.module)


def layers_of(module: nn.Module) -> list[Layer]:
    """Return every module that owns trainable parameters, once; an owner without a rule owns its children."""
    return list(_walk(module, "", set()))


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[Layer]:
    if module in seen:
        return
    seen.add(module)
    owns = any(p.requires_grad for p in module.parameters(recurse=False))
    rule = rule_for(module)
    if rule is not None:
        if owns:
            yield Layer(path, module, rule)
    elif owns or (isinstance(module, OPAQUE) and any(p.requires_grad for p in module.parameters())):
        seen.update(module.modules())
        yield Layer(path, module, None)
    else:
        for name, child in module.named_children():
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def refuse_model(module: nn.Module, layers: list[Layer]) -> None:
    """Raise for a model that cannot be captured.

    Raises
    ------
    RefusedModelError
        If nothing is trainable, samples mix, a layer's settings allow no per-sample gradients, or a
        forward is shadowed already. All offenders are named.

    """
    if not layers:
        raise RefusedModelError(
            f"{type(module).__name__} has no trainable parameter: set requires_grad on those to train"
        )
    refuse_mixing(module)
    shadowed = [("", module), *((layer.path, layer.module) for layer in layers if layer.path)]
    reasons = [f"{_named(path, m)}: {why}" for path, m in shadowed if (why := _why_not_shadowed(m))]
    reasons += [
        f"{layer}: {why}" for layer in layers if layer.rule and (why := layer.rule.refusal(layer.module))
    ]
    if reasons:
        raise RefusedModelError("no per-sample gradients for this model:\n  " + "\n  ".join(reasons))


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


def _why_not_shadowed(module: nn.Module) -> str | None:
    forward = module.__dict__.get("forward")
    if isinstance(forward, ShadowForward):
        return "a psgrad handle is attached already; call its remove() first"
    return None if forward is None else "its forward was replaced on the instance, which no rule sees through"


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the model itself'} ({type(module).__name__})"
