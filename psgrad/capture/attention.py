"""`F.multi_head_attention_forward` in terms of linear maps, each of which a rule knows."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention"]


def attention(
    linear: Callable[..., Tensor],
    rows: int,
    query: Any,
    key: Any,
    value: Any,
    width: int,
    heads: int,
    weight: Any,
    bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Any,
    out_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `L N E` to `S N E`: `L N E`, and if asked for its weights `N L S` or `N H L S`.

    One linear map gives queries, keys and values of all positions together, those of other inputs besides:
    the parameter is used once, and of no sample is the gradient of a part of it written out.

    Parameters
    ----------
    linear
        As `F.linear`.
    rows
        N.

    Raises
    ------
    ValueError
        If something else is asked for.

    """
    inputs = list({id(t): t for t in (query, key, value)}.values())
    unusual = bias_k is not None or bias_v is not None or add_zero_attn or use_separate_proj_weight
    given = others.get("static_k") is not None or others.get("static_v") is not None
    if unusual or given or any(t.ndim != 3 or t.shape[1:] != (rows, width) for t in inputs):
        raise ValueError("attention with more than one linear map, or not of batches")
    # .. N E -> N (..) (3 E)
    mapped = linear(torch.cat([t.transpose(0, 1) for t in inputs], 1), weight, bias)
    of = {id(t): part for t, part in zip(inputs, mapped.split([len(t) for t in inputs], 1), strict=True)}
    # N L (3 H D) -> N H L D
    q, k, v = (
        of[id(t)].unflatten(2, (3, heads, -1))[:, :, i].transpose(1, 2)
        for i, t in enumerate((query, key, value))
    )
    mask = _mask(attn_mask, key_padding_mask, rows, heads, q.dtype)
    dropout = dropout if training else 0.0
    if need_weights:
        scores = (q * sqrt(1 / q.shape[-1])) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        mixed = weights @ v
    else:
        causal = is_causal and attn_mask is not None and key_padding_mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
    out = linear(mixed.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _mask(of_positions: Any, of_keys: Any, rows: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores `N H L S`: of `L S` or `(N H) L S`, and `N S`; True is what is left out.

    Raises
    ------
    ValueError
        If one is a parameter's, or has another shape.

    """
    found = []
    for mask, ndim in ((of_positions, 3), (of_keys, 2)):
        if mask is None:
            continue
        shared = ndim == 3 and mask.ndim == 2
        of_samples = mask.ndim == ndim and len(mask) == (rows * heads if ndim == 3 else rows)
        if type(mask) is not Tensor or not (shared or of_samples):
            raise ValueError("attention with a mask that may not be of samples")
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        found.append(
            mask if shared else mask.unflatten(0, (rows, heads)) if ndim == 3 else mask[:, None, None]
        )
    return sum(found[1:], found[0]) if found else None
