"""`nn.Embedding`: gradients that are zero in all but the rows a sample looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.layers.base import LayerCall, LayerRule, accumulation_dtype, drop_removed, per_row

__all__ = ["Embedding"]


class Embedding(LayerRule):
    """`grad[n, v] = sum over the positions t of sample n with x_t = v of g_t`."""

    looks_up = True

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse what changes the weight or its gradient by looking at the whole batch."""
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq counts words over the whole batch; set it to False"
        if module.max_norm is not None:
            return "max_norm changes the weight during the forward pass; renormalise it yourself"
        return None

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        weight = params["weight"]
        assert weight is not None
        return F.embedding(x, weight, module.padding_idx)

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        words, dim = _weight_shape(call)
        looked_up, g = _looked_up(call)
        grads = g.new_zeros(call.samples * words, dim).index_add_(0, looked_up, g)
        return {"weight": grads.reshape(call.samples, words, dim)}

    def sq_norms(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.sq_norms`; only the rows that were looked up are made."""
        words, dim = _weight_shape(call)
        looked_up, g = _looked_up(call)
        rows, position = looked_up.unique(return_inverse=True)
        dtype = accumulation_dtype(g.dtype)
        sums = g.new_zeros(len(rows), dim, dtype=dtype).index_add_(0, position, g.to(dtype))
        norms = g.new_zeros(call.samples, dtype=dtype)
        return {"weight": norms.index_add_(0, rows // words, sums.square().sum(1))}

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`."""
        words, dim = _weight_shape(call)
        g = drop_removed(call.g, factors, call.rows_per_sample)
        g = (g * per_row(factors, g, call.rows_per_sample)).reshape(-1, dim)
        x = call.x.flatten()
        kept = x != _padding_word(call)
        return {"weight": g.new_zeros(words, dim).index_add_(0, x[kept], g[kept])}


def _weight_shape(call: LayerCall) -> tuple[int, int]:
    module: Any = call.module
    return module.num_embeddings, module.embedding_dim


def _padding_word(call: LayerCall) -> int:
    """Return the word without gradient, or one that does not occur."""
    module: Any = call.module
    return -1 if module.padding_idx is None else module.padding_idx


def _looked_up(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Return the row of the per-sample gradients, n * words + x, and g for every position that has one."""
    words, dim = _weight_shape(call)
    x = call.by_sample(call.x).flatten(1)
    sample = x.new_tensor(range(call.samples)).unsqueeze(1) * words
    kept = (x != _padding_word(call)).flatten()
    return (sample + x).flatten()[kept], call.g.reshape(-1, dim)[kept]
