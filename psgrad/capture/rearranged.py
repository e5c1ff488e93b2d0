"""Norms through a weight that has all of a parameter's elements, in another order: they are its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from psgrad.conv.numerics import squared_norms
from psgrad.layers import LayerCall, LayerRule

__all__ = ["Rearranged"]


@dataclass(frozen=True, eq=False)
class Rearranged:
    """What `psgrad.capture.row_maps.RowMaps` is to a weight computed row by row.

    Attributes
    ----------
    parameter
        Whose elements the weight has.

    """

    parameter: nn.Parameter

    def sq_norms(self, rule: LayerRule, call: LayerCall, output: Tensor | None) -> dict[nn.Parameter, Tensor]:
        """Squared norms `[N]`, of a call of the layer with the weight."""
        return {self.parameter: rule.sq_norms(replace(call, wanted=("weight",)))["weight"]}

    def sq_norms_of(self, grads: Tensor) -> dict[nn.Parameter, Tensor]:
        """As `sq_norms`, of written-out gradients `[N, *weight.shape]`."""
        return {self.parameter: squared_norms(grads)}
