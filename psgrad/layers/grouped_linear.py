"""A linear map for each of several groups, as heads have them, by function: no layer of PyTorch is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from psgrad.conv.products import batched
from psgrad.layers.base import LayerCall, LayerRule, drop_removed, per_row
from psgrad.layers.linear import weight_sq_norms

__all__ = ["GroupedLinear", "grouped_linear"]


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """N G T I, G O I -> N G T O."""
    if has_torch_function((x, weight)):
        return handle_torch_function(grouped_linear, (x, weight), x, weight)
    return torch.einsum("ngti,goi->ngto", x, weight)


class GroupedLinear(LayerRule):
    """`N G O(KT) @ N G (KT)I -> N G O I`, the gradient of `grouped_linear`."""

    def input_error(self, module: nn.Module, x: Tensor) -> str | None:
        """Ask for all four axes."""
        return None if x.ndim == 4 else f"the input has {x.ndim} axes, not 4"

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        weight = params["weight"]
        assert weight is not None
        return grouped_linear(x, weight)

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        x, g = _operands(call)
        return {"weight": batched(g.mT, x).unflatten(0, (call.samples, -1))} if call.wanted else {}

    def sq_norms(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.sq_norms`; each group has that of a linear layer."""
        x, g = _operands(call)
        return {"weight": weight_sq_norms(x, g).view(call.samples, -1).sum(1)} if call.wanted else {}

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`: one matrix product a group, with the smaller of x and g scaled."""
        g = drop_removed(call.g, factors, call.rows_per_sample)
        x = drop_removed(call.x.to(g.dtype), factors, call.rows_per_sample)
        scale = per_row(factors, g, call.rows_per_sample)
        x, g = (x * scale, g) if x.shape[3] < g.shape[3] else (x, g * scale)
        return {"weight": torch.einsum("ngto,ngti->goi", g, x)} if call.wanted else {}


def _operands(call: LayerCall) -> tuple[Tensor, Tensor]:
    """(NK) G T I, (NK) G T O -> (N G) (KT) I, (N G) (KT) O, in the dtype of g."""

    def by_group(t: Tensor) -> Tensor:
        return call.by_sample(t).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    return by_group(call.x.to(call.g.dtype)), by_group(call.g)
