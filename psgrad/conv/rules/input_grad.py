"""The input gradient of a convolution: what `aten::convolution_backward` returns first."""

from __future__ import annotations

from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.layout import make_dummy, move_batch_dim_to_front, reshape_dim_into, reshape_dim_outof
from psgrad.conv.rules.call import Batched, Call, with_one_entry, without_entries
from psgrad.conv.rules.checks import check_backward

__all__ = ["convolution_backward_input_batch_rule", "input_grad"]


def convolution_backward_input_batch_rule(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    geometry: ConvGeometry,
) -> Batched:
    """Compute the gradient with respect to x for every entry of `B`, in one call of the operator.

    The values of x are not read: the operator gets a dummy of its folded shape.

    Parameters
    ----------
    grad_output, gbdim, x, xbdim, weight, wbdim, geometry
        As for `convolution_backward_batch_rule`.

    Returns
    -------
    tuple of Tensor and (int or None)
        `N(GI)` and spatial axes with `B` at the position given with it: 1 if the weight is batched,
        0 if grad_output alone is, None if neither is (whatever x is). Differentiable.

    Raises
    ------
    ShapeError
        If shapes, bdims or the geometry do not fit; the message has the shapes.

    """
    gbdim, xbdim, wbdim, call = check_backward(grad_output, gbdim, x, xbdim, weight, wbdim, geometry)
    return input_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call)


def input_grad(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    call: Call,
) -> Batched:
    """`convolution_backward_input_batch_rule` for operands that fit: nothing is checked."""
    batch = weight.shape[wbdim] if wbdim is not None else 1 if gbdim is None else grad_output.shape[gbdim]
    if batch == 0:
        grad_output, weight = with_one_entry(grad_output, gbdim), with_one_entry(weight, wbdim)
        return without_entries(*input_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call))
    if call.margins is None:
        return _input_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call, batch)
    if call.transposed:
        grad_output, gbdim = call.padded(grad_output, gbdim)
        return _input_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call, batch)
    padded = call.padded_dummy(make_dummy(x, xbdim, 0, 1))
    grad, bdim = _input_grad(grad_output, gbdim, padded, None, weight, wbdim, call, batch)
    return call.cropped(grad), bdim


def _input_grad(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    call: Call,
    batch: int,
) -> Batched:
    groups = call.groups
    if wbdim is None:
        dummy = make_dummy(x, xbdim, 0, batch)
        if gbdim is None:
            # x does not enter: N(GO), (GO)I -> N(GI)
            return call.input_grad(grad_output, dummy, weight, groups), None
        # BNO -> (BN)O, OI -> (BN)I -> BNI
        grad = call.input_grad(reshape_dim_into(gbdim, 0, grad_output), dummy, weight, groups)
        return reshape_dim_outof(0, batch, grad), 0

    dummy = make_dummy(x, xbdim, 1, batch)
    if gbdim is not None:
        # BN(GO) -> N(BGO), B(GO)I -> (BGO)I, groups B*G: N(BGI) -> NB(GI); transposed B(GI)O -> (BGI)O
        folded = reshape_dim_into(wbdim, 0, weight)
        grad = call.input_grad(reshape_dim_into(gbdim, 1, grad_output), dummy, folded, batch * groups)
        return reshape_dim_outof(1, batch, grad), 1
    if groups == 1:
        # NO, BOI -> O(BI): N(BI) -> NBI; transposed BIO -> (BI)O
        folded = reshape_dim_into(wbdim, 0 if call.transposed else 1, weight)
        return reshape_dim_outof(1, batch, call.input_grad(grad_output, dummy, folded, 1)), 1
    if call.transposed:
        # B(GI)O -> BGIO -> G(BI)O -> (GBI)O
        split = reshape_dim_outof(1, groups, move_batch_dim_to_front(weight, wbdim))
        folded = reshape_dim_into(0, 1, split).flatten(0, 1)
    else:
        # B(GO)I -> (GO)(BI)
        folded = reshape_dim_into(wbdim, 1, weight)
    # N(GO), either weight: N(GBI) -> NG(BI) -> NGBI -> NB(GI). The channels come group by group:
    # G has to be taken out before B, and goes back behind it.
    grad = reshape_dim_outof(1, groups, call.input_grad(grad_output, dummy, folded, groups))
    return reshape_dim_into(1, 2, reshape_dim_outof(2, batch, grad)), 1
