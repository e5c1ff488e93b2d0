"""The whole of `aten::convolution_backward`: three gradients, an output mask, and the last resort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.layout import move_batch_dim_to_front, reshape_dim_into, reshape_dim_outof
from psgrad.conv.rules.call import Batched, Call, batch_length, with_one_entry
from psgrad.conv.rules.checks import check_backward
from psgrad.conv.rules.input_grad import input_grad
from psgrad.conv.rules.weight_grad import weight_grad
from psgrad.errors import ShapeError

__all__ = [
    "Gradients",
    "backward",
    "compute_grad_bias",
    "convolution_backward_batch_rule",
    "slow_fallback",
]

OptionalBatched = tuple[Tensor | None, int | None]
Gradients = tuple[OptionalBatched, OptionalBatched, OptionalBatched]
"""Gradients of x, weight and bias, each with its bdim; (None, None) where the mask did not ask."""


def convolution_backward_batch_rule(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    geometry: ConvGeometry,
    output_mask: Sequence[bool],
) -> Gradients:
    """Compute the gradients of x, weight and bias for every entry of `B`.

    With all three operands batched (a model ensemble) the first two come from one call of the
    operator; otherwise each comes from its own rule, and only if it is asked for.

    Parameters
    ----------
    grad_output
        `N(GO)` and spatial axes, with `B` at `gbdim`.
    x
        `N(GI)` and spatial axes, with `B` at `xbdim`.
    weight
        `(GO)I` and kernel axes, transposed `(GI)O`, with `B` at `wbdim`.
    gbdim, xbdim, wbdim
        Position of `B`, negative ones counted from the end; None where there is none.
    geometry
        Of the convolution; padding may differ before and after.
    output_mask
        Three bools: whether the gradients of x, weight and bias are asked for.

    Returns
    -------
    tuple of three pairs
        Each a gradient and its bdim, or (None, None) if it was not asked for. A gradient that does
        not depend on a batched operand has no `B`, bdim None. Differentiable.

    Raises
    ------
    ShapeError
        If shapes, bdims or the geometry do not fit; the message has the shapes.

    """
    gbdim, xbdim, wbdim, call = check_backward(grad_output, gbdim, x, xbdim, weight, wbdim, geometry)
    return backward(grad_output, gbdim, x, xbdim, weight, wbdim, call, mask_of(output_mask))


def backward(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    call: Call,
    output_mask: Sequence[bool],
) -> Gradients:
    """`convolution_backward_batch_rule` for operands that fit: nothing is checked."""
    grad_x: OptionalBatched = (None, None)
    grad_weight: OptionalBatched = (None, None)
    want_x, want_weight, want_bias = output_mask
    together = want_x and want_weight and call.margins is None
    if together and gbdim is None and xbdim is None and wbdim is None:
        plain_x, plain_weight = call.both_grads(grad_output, x, weight, call.groups)
        grad_x, grad_weight = (plain_x, None), (plain_weight, None)
    elif together and gbdim is not None and xbdim is not None and wbdim is not None and x.shape[xbdim] != 0:
        grad_x, grad_weight = _ensemble(grad_output, gbdim, x, xbdim, weight, wbdim, call)
    else:
        if want_x:
            grad_x = input_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call)
        if want_weight:
            grad_weight = weight_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call)
    grad_bias = compute_grad_bias(grad_output, output_mask, gbdim)
    return grad_x, grad_weight, (grad_bias, 0 if want_bias and gbdim is not None else None)


def _ensemble(
    grad_output: Tensor, gbdim: int, x: Tensor, xbdim: int, weight: Tensor, wbdim: int, call: Call
) -> tuple[Batched, Batched]:
    # BN(GO) -> N(BGO), BN(GI) -> N(BGI), B(GO)I -> (BGO)I, groups B*G:
    # N(BGI) -> NB(GI) and (BGO)I -> B(GO)I; transposed B(GI)O -> (BGI)O
    batch = x.shape[xbdim]
    grad_x, grad_weight = call.both_grads(
        reshape_dim_into(gbdim, 1, grad_output),
        reshape_dim_into(xbdim, 1, x),
        reshape_dim_into(wbdim, 0, weight),
        batch * call.groups,
    )
    return (reshape_dim_outof(1, batch, grad_x), 1), (reshape_dim_outof(0, batch, grad_weight), 0)


def compute_grad_bias(
    grad_output: Tensor, output_mask: Sequence[bool], gbdim: int | None = None
) -> Tensor | None:
    """Sum over every axis but the channels (and `B`): `BN(GO) -> B(GO)`, `N(GO) -> (GO)`.

    Parameters
    ----------
    grad_output
        `N(GO)` and spatial axes, with `B` at `gbdim`.
    output_mask
        Three bools; the third says whether the gradient is asked for.
    gbdim
        Position of `B`; None if there is none.

    Returns
    -------
    Tensor or None
        `(GO)`, with `B` in front if there is one; None if not asked for. Zero where N = 0.

    Raises
    ------
    ShapeError
        If `gbdim` is out of range, grad_output without samples and channels, or the mask not of three.

    """
    if not mask_of(output_mask)[2]:
        return None
    if gbdim is not None and not isinstance(gbdim, int):
        raise ShapeError(
            f"bdim {gbdim!r} of grad_output {tuple(grad_output.shape)} is neither an int nor None"
        )
    if grad_output.ndim - (gbdim is not None) < 2:
        raise ShapeError(f"grad_output {tuple(grad_output.shape)} with bdim {gbdim} is not N(GO)")
    if gbdim is None:
        return grad_output.sum([0, *range(2, grad_output.ndim)])
    return move_batch_dim_to_front(grad_output, gbdim).sum([1, *range(3, grad_output.ndim)])


def slow_fallback(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    geometry: ConvGeometry,
    output_mask: Sequence[bool],
) -> Gradients:
    """Do what `convolution_backward_batch_rule` does, in a loop over `B`: one operator call an entry.

    The rules cover every combination of batched operands, so nothing falls back to this on its own;
    it is the last resort for a caller whose backend fails on a folded shape, and what the rules are
    tested against. Arguments, results and errors are the same, but that with any operand batched
    every gradient has its `B` in front.
    """
    gbdim, xbdim, wbdim, call = check_backward(grad_output, gbdim, x, xbdim, weight, wbdim, geometry)
    mask = mask_of(output_mask)
    batch = batch_length((grad_output, gbdim), (x, xbdim), (weight, wbdim))
    if batch is None:
        return backward(grad_output, None, x, None, weight, None, call, mask)
    operands = [(grad_output, gbdim), (x, xbdim), (weight, wbdim)]
    if batch == 0:
        operands = [(with_one_entry(t, bdim), bdim) for t, bdim in operands]
    entries = []
    for b in range(max(batch, 1)):
        g, i, w = (t if bdim is None else t.select(bdim, b) for t, bdim in operands)
        # one gradient a call: what is not needed is a dummy, whatever the strides of the operand
        entries.append(
            (
                input_grad(g, None, i, None, w, None, call)[0] if mask[0] else None,
                weight_grad(g, None, i, None, w, None, call)[0] if mask[1] else None,
                compute_grad_bias(g, mask),
            )
        )
    grad_x, grad_weight, grad_bias = (_stacked(grads, batch) for grads in zip(*entries, strict=True))
    return grad_x, grad_weight, grad_bias


def _stacked(grads: Sequence[Tensor | None], batch: int) -> OptionalBatched:
    """Stack the gradients of the entries, of which the first `batch` count; None if not asked for."""
    present = [grad for grad in grads if grad is not None]
    return (torch.stack(present)[:batch], 0) if present else (None, None)


def mask_of(output_mask: Sequence[bool]) -> tuple[bool, bool, bool]:
    if not isinstance(output_mask, (list, tuple)) or len(output_mask) != 3:
        raise ShapeError(f"output_mask must have three entries, for x, weight and bias, got {output_mask!r}")
    want_x, want_weight, want_bias = output_mask
    return bool(want_x), bool(want_weight), bool(want_bias)
