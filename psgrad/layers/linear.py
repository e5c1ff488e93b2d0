"""`nn.Linear` on inputs with any number of axes between batch and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.conv.chunking import evenly
from psgrad.conv.numerics import RunningSum
from psgrad.conv.products import batched, product
from psgrad.conv.scratch import scratch
from psgrad.conv.strategies.gram import eaten, norms_of_grams
from psgrad.layers.base import (
    LayerCall,
    LayerRule,
    accumulation_dtype,
    drop_removed,
    sample_sum,
    squared_norms,
)

__all__ = ["Linear", "TransposedLinear", "weight_sq_norms"]

CHUNK_BYTES = 4 * 2**20
"""Of gradients that are made to be squared, and perhaps added up."""
BYTES_FOR_FLOPS = 30
"""Of a processor that does so many FLOPs while it writes and reads an element of a gradient thrice.

Fitted to 13 layers: the better of the two ways on 11; 1.07x of it on one, 1.26x on one of 100 microseconds.
"""


class Linear(LayerRule):
    """`N O(KT) @ N (KT)I -> N O I`, the gradient of `x @ weight.T + bias`."""

    output_axis: ClassVar[int | None] = -1

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
            grads["weight"] = batched(g.mT, x)
        if "bias" in call.wanted:
            grads["bias"] = sample_sum(call, call.g, keep=(call.g.ndim - 1,))
        return grads

    def sq_norms(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.sq_norms`; by Gram matrices over positions where that is less."""
        x, g = _operands(call)
        norms = {}
        if "weight" in call.wanted:
            norms["weight"] = weight_sq_norms(x, g)
        if "bias" in call.wanted:
            norms["bias"] = squared_norms(g.sum(1, dtype=accumulation_dtype(g.dtype)))
        return norms

    def norms_and_sums(self, call: LayerCall) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """See `LayerRule.norms_and_sums`: from gradients made in chunks, where that takes less than Grams."""
        if "weight" not in call.wanted or call.samples == 0 or call.g.dtype.itemsize < 4:
            return None
        x, g = _operands(call)
        positions, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
        if positions == 1 or BYTES_FOR_FLOPS * inputs * outputs > positions**2 * (inputs + outputs):
            return None
        total = RunningSum(g.dtype)
        norms, sums = {"weight": _sq_norms(x, g, total)}, {"weight": total.value()}
        if "bias" in call.wanted:
            bias = g.sum(1, dtype=accumulation_dtype(g.dtype))
            norms["bias"], sums["bias"] = squared_norms(bias), bias.sum(0)
        return norms, sums

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`: one matrix product, with the smaller of x and g scaled."""
        g = drop_removed(call.g, factors, call.rows_per_sample).flatten(0, -2)
        scale = factors.to(g.dtype).unsqueeze(1).expand(-1, len(g) // max(1, call.samples)).flatten()
        sums = {}
        if "weight" in call.wanted:
            x = drop_removed(call.x.to(g.dtype), factors, call.rows_per_sample).flatten(0, -2)
            smaller, larger = (x, g) if x.shape[1] < g.shape[1] else (g, x)
            scaled = smaller * scale.unsqueeze(1)
            sums["weight"] = product(larger.T, scaled) if smaller is x else product(scaled.T, larger)
        if "bias" in call.wanted:
            sums["bias"] = scale @ g
        return sums


class TransposedLinear(Linear):
    """`N I(KT) @ N (KT)O -> N I O`, the gradient of `x @ weight + bias`: the `Conv1D` of GPT-2."""

    output_axis: ClassVar[int | None] = None

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        weight = params["weight"]
        assert weight is not None
        return F.linear(x, weight.T, params["bias"])

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        return _transposed(super().grads(call))

    def norms_and_sums(self, call: LayerCall) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """See `LayerRule.norms_and_sums`."""
        found = super().norms_and_sums(call)
        return None if found is None else (found[0], _transposed(found[1]))

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`."""
        return _transposed(super().weighted_sum(call, factors))


def _transposed(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.mT.contiguous() if name == "weight" else t for name, t in of.items()}


def _operands(call: LayerCall) -> tuple[Tensor, Tensor]:
    """(NK)..I, (NK)..O -> N (KT) I, N (KT) O, in the dtype of g."""
    g = call.by_sample(call.g).flatten(1, -2)
    x = call.by_sample(call.x.to(call.g.dtype)).flatten(1, -2)
    return x, g


def weight_sq_norms(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms of the weight's gradients, N T I, N T O -> N; by Gram matrices where that is less."""
    positions, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
    if positions * (inputs + outputs) >= inputs * outputs and positions != 1:
        return _sq_norms(x, g)
    return _gram_sq_norms(x, g)


def _sq_norms(x: Tensor, g: Tensor, total: RunningSum | None = None) -> Tensor:
    """N T I, N T O -> N, from gradients `[n, O, I]` of a few samples at a time, which `total` adds up."""
    samples, _, inputs = x.shape
    each = max(1, inputs * g.shape[2] * g.dtype.itemsize)
    step = evenly(samples, max(1, CHUNK_BYTES // each), torch.get_num_threads())
    norms = []
    for start in range(0, samples, step):
        here = slice(start, start + step)
        left, right = g[here].mT, x[here]
        grads = scratch("gradients", (len(left), left.shape[1], inputs), g)
        batched(left, right, grads)
        norms.append(squared_norms(grads))
        if total is not None:
            total.add(grads, grads.new_ones(len(grads)))
    return torch.cat(norms) if norms else squared_norms(g.flatten(1))


def _gram_sq_norms(x: Tensor, g: Tensor) -> Tensor:
    """`||sum_t g_t x_t^T||^2 = sum_{t,t'} <g_t, g_t'> <x_t, x_t'>`, N T I, N T O -> N.

    One position is exact. Of more, what cancellation has eaten is computed again, directly, as
    `psgrad.conv.strategies.gram.cancellation` explains.
    """
    dtype = accumulation_dtype(g.dtype)
    x, g = x.to(dtype), g.to(dtype)
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * g.square().sum((1, 2))
    norms, left = norms_of_grams(batched(g, g.mT), batched(x, x.mT))
    for n in eaten(left):
        norms[n] = (g[n].T @ x[n]).square().sum()
    return norms
