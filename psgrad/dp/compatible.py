"""Models without what mixes samples: GroupNorm in the place of every BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from opacus.validators import ModuleValidator
from torch import nn

__all__ = ["without_batch_norm"]


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Return a copy in which Opacus's `ModuleValidator.fix` has replaced what mixes samples.

    It knows torch's own layers, by their exact type. Replaced besides, in the same way, are BatchNorms that
    have their activation inside, as timm's networks for images have them. Dtypes are kept.
    """
    fixed: nn.Module = ModuleValidator.fix(module)
    before = dict(module.named_modules())
    for path, layer in fixed.named_modules():
        like = next(before[path].parameters(), None) if path in before else None
        if like is not None and type(layer) is not type(before[path]):
            layer.to(like.dtype)  # Opacus makes it in the default dtype
    if (replace := _replacement(fixed)) is not None:
        return replace(fixed)
    for parent in list(fixed.modules()):
        for name, layer in parent.named_children():
            if (replace := _replacement(layer)) is not None:
                parent.add_module(name, replace(layer))
    return fixed


def _replacement(layer: nn.Module) -> Callable[[Any], nn.Module] | None:
    kind = type(layer)
    return DERIVED.get(f"{kind.__module__}.{kind.__qualname__}")


def _group_norm_drop_act(layer: Any) -> nn.Module:
    """Return a GroupNorm, with as many groups as Opacus gives one, and what the layer has behind its norm."""
    groups = math.gcd(32, layer.num_features)
    norm = nn.GroupNorm(groups, layer.num_features, layer.eps, layer.affine)
    if layer.affine:
        norm.to(layer.weight.device, layer.weight.dtype)
    return nn.Sequential(norm, layer.drop, layer.act).train(layer.training)


DERIVED: dict[str, Callable[[Any], nn.Module]] = {
    "timm.layers.norm_act.BatchNormAct2d": _group_norm_drop_act,
    "timm.layers.norm_act.SyncBatchNormAct": _group_norm_drop_act,
}
"""What replaces layers in libraries that psgrad does not import, by their type's name."""
