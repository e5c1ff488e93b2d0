"""`nn.Linear` on inputs with any number of axes between batch and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.layers.base import LayerCall, LayerRule, accumulation_dtype, drop_removed, per_row, sample_sum

__all__ = ["Linear"]


class Linear(LayerRule):
    """`N O(KT) @ N (KT)I -> N O I`, the gradient of `x @ weight.T + bias`."""

    def input_error(self, module: nn.Module, x: Tensor) -> str | None:
        """Ask for a batch axis, which the layer itself does not."""
        return None if x.ndim > 1 else f"the input has {x.ndim} axis, a batch has at least 2"

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        weight = params["weight"]
        assert weight is not None
        return F.linear(x, weight, params["bias"])

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        grads = {}
        if "weight" in call.wanted:
            x, g = _operands(call)
            grads["weight"] = g.transpose(1, 2) @ x
        if "bias" in call.wanted:
            grads["bias"] = sample_sum(call, call.g, keep=(call.g.ndim - 1,))
        return grads

    def sq_norms(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.sq_norms`; one position per sample has norm |x|^2 |g|^2, exactly."""
        x, g = _operands(call)
        if x.shape[1] != 1:
            return super().sq_norms(call)
        dtype = accumulation_dtype(g.dtype)
        g_norms = g[:, 0].to(dtype).square().sum(1)
        norms = {}
        if "weight" in call.wanted:
            norms["weight"] = g_norms * x[:, 0].to(dtype).square().sum(1)
        if "bias" in call.wanted:
            norms["bias"] = g_norms
        return norms

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`: one matrix product on the scaled g."""
        g = drop_removed(call.g, factors, call.rows_per_sample)
        g = (g * per_row(factors, g, call.rows_per_sample)).flatten(0, -2)
        sums = {}
        if "weight" in call.wanted:
            x = drop_removed(call.x.to(g.dtype), factors, call.rows_per_sample).flatten(0, -2)
            sums["weight"] = g.T @ x
        if "bias" in call.wanted:
            sums["bias"] = g.sum(0)
        return sums


def _operands(call: LayerCall) -> tuple[Tensor, Tensor]:
    """(NK)..I, (NK)..O -> N (KT) I, N (KT) O, in the dtype of g."""
    g = call.by_sample(call.g).flatten(1, -2)
    x = call.by_sample(call.x.to(call.g.dtype)).flatten(1, -2)
    return x, g
