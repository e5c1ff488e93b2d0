"""The layers that stand for what a module computes by `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from psgrad.capture.computed import Computed, Operand
from psgrad.capture.survey import Layer
from psgrad.layers import LayerRule

__all__ = ["FunctionLayers"]


class FunctionLayers:
    """Makes them. Within a call of the model, what has the same parameters is one layer, whose calls add up.

    Parameters
    ----------
    owners
        Of every trainable parameter, the path of the module that owns it.

    """

    def __init__(self, owners: Mapping[nn.Parameter, str]) -> None:
        self._owners = owners
        self._known: dict[tuple[Any, ...], Computed] = {}

    def forget(self) -> None:
        """Begin a call of the model."""
        self._known.clear()

    def of(
        self, rule: LayerRule, settings: nn.Module, weight: Operand, bias: Operand
    ) -> tuple[Layer, Computed | None]:
        """Return the layer, and how its parameters are computed, if they are."""
        computed = Computed.of(settings, weight=weight, bias=bias)
        if computed.as_it_is:
            computed = self._known.setdefault((settings, weight, bias), computed)
        path = next(self._owners[p] for p in computed.parameters if p in self._owners)
        return Layer(path, computed.layer, rule), None if computed.as_it_is else computed
