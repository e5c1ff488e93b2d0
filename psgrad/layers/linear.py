"""`nn.Linear` on inputs with any number of axes between batch and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.conv.strategies.gram import eaten, norms_of_grams
from psgrad.layers.base import (
    LayerCall,
    LayerRule,
    accumulation_dtype,
    drop_removed,
    sample_sum,
    squared_norms,
)

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
        """See `LayerRule.sq_norms`; by Gram matrices over positions where that is less."""
        x, g = _operands(call)
        positions, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
        if positions * (inputs + outputs) >= inputs * outputs and positions != 1:
            return super().sq_norms(call)
        norms = {}
        if "weight" in call.wanted:
            norms["weight"] = _gram_sq_norms(x, g)
        if "bias" in call.wanted:
            norms["bias"] = squared_norms(g.sum(1, dtype=accumulation_dtype(g.dtype)))
        return norms

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`: one matrix product, with the smaller of x and g scaled."""
        g = drop_removed(call.g, factors, call.rows_per_sample).flatten(0, -2)
        scale = factors.to(g.dtype).unsqueeze(1).expand(-1, len(g) // max(1, call.samples)).flatten()
        sums = {}
        if "weight" in call.wanted:
            x = drop_removed(call.x.to(g.dtype), factors, call.rows_per_sample).flatten(0, -2)
            smaller, larger = (x, g) if x.shape[1] < g.shape[1] else (g, x)
            scaled = smaller * scale.unsqueeze(1)
            sums["weight"] = larger.T @ scaled if smaller is x else scaled.T @ larger
        if "bias" in call.wanted:
            sums["bias"] = scale @ g
        return sums


def _operands(call: LayerCall) -> tuple[Tensor, Tensor]:
    """(NK)..I, (NK)..O -> N (KT) I, N (KT) O, in the dtype of g."""
    g = call.by_sample(call.g).flatten(1, -2)
    x = call.by_sample(call.x.to(call.g.dtype)).flatten(1, -2)
    return x, g


def _gram_sq_norms(x: Tensor, g: Tensor) -> Tensor:
    """`||sum_t g_t x_t^T||^2 = sum_{t,t'} <g_t, g_t'> <x_t, x_t'>`, N T I, N T O -> N.

    One position is exact. Of more, what cancellation has eaten is computed again, directly, as
    `psgrad.conv.strategies.gram.cancellation` explains.
    """
    dtype = accumulation_dtype(g.dtype)
    x, g = x.to(dtype), g.to(dtype)
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * g.square().sum((1, 2))
    norms, left = norms_of_grams(torch.bmm(g, g.mT), torch.bmm(x, x.mT))
    for n in eaten(left):
        norms[n] = (g[n].T @ x[n]).square().sum()
    return norms
