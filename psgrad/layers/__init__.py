"""The layers whose per-sample gradients have a rule, and those that make samples depend on each other."""

from __future__ import annotations

from typing import Any

from torch import nn

from psgrad.layers.base import LayerCall, LayerRule
from psgrad.layers.conv import Convolution, TransposedConvolution
from psgrad.layers.embedding import Embedding
from psgrad.layers.linear import Linear, TransposedLinear
from psgrad.layers.mixing import why_samples_mix
from psgrad.layers.norm import BatchNormEval, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = ["NAMED_RULES", "RULES", "LayerCall", "LayerRule", "rule_for", "why_samples_mix"]

RULES: dict[type[nn.Module], LayerRule] = {
    nn.Conv1d: Convolution(),
    nn.Conv2d: Convolution(),
    nn.Conv3d: Convolution(),
    nn.ConvTranspose1d: TransposedConvolution(),
    nn.ConvTranspose2d: TransposedConvolution(),
    nn.ConvTranspose3d: TransposedConvolution(),
    nn.Linear: Linear(),
    nn.Embedding: Embedding(),
    nn.GroupNorm: GroupNorm(),
    nn.InstanceNorm1d: InstanceNorm(),
    nn.InstanceNorm2d: InstanceNorm(),
    nn.InstanceNorm3d: InstanceNorm(),
    nn.LayerNorm: LayerNorm(),
    nn.RMSNorm: RMSNorm(),
    nn.BatchNorm1d: BatchNormEval(),
    nn.BatchNorm2d: BatchNormEval(),
    nn.BatchNorm3d: BatchNormEval(),
}
"""The rule of every layer that has one. A new layer is a rule and a line here."""

NAMED_RULES: dict[str, LayerRule] = {
    "transformers.pytorch_utils.Conv1D": TransposedLinear(),
}
"""As `RULES`, of layers in libraries that psgrad does not import."""


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule that describes what this module computes, or None.

    A subclass has its base's rule as long as it computes the same: a `forward` of its own takes it away.
    """
    for base in type(module).__mro__:
        rule = RULES.get(base) or NAMED_RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule if _computes_the_same(type(module), base) else None
    return None


def _computes_the_same(derived: Any, base: Any) -> bool:
    methods = ("forward", "_conv_forward")
    return all(getattr(derived, name, None) is getattr(base, name, None) for name in methods)
