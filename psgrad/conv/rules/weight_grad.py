"""The weight gradient of a convolution: what `aten::convolution_backward` returns second."""

from __future__ import annotations

from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.layout import make_dummy, move_batch_dim_to_front, reshape_dim_into, reshape_dim_outof
from psgrad.conv.rules.call import Batched, Call, with_one_entry, without_entries
from psgrad.conv.rules.checks import check_backward

__all__ = ["convolution_backward_weight_batch_rule", "weight_grad"]


def convolution_backward_weight_batch_rule(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    geometry: ConvGeometry,
) -> Batched:
    """Compute the gradient with respect to the weight for every entry of `B`, in one operator call.

    The values of the weight are not read: the operator gets a dummy of its folded shape. With
    grad_output and x batched and N = 1 this is the per-sample gradient.

    Parameters
    ----------
    grad_output, gbdim, x, xbdim, weight, wbdim, geometry
        As for `convolution_backward_batch_rule`.

    Returns
    -------
    tuple of Tensor and (int or None)
        The weight's shape with `B` at the position given with it: 0 or 1, None if neither
        grad_output nor x is batched (whatever the weight is). Differentiable.

    Raises
    ------
    ShapeError
        If shapes, bdims or the geometry do not fit; the message has the shapes.

    """
    gbdim, xbdim, wbdim, call = check_backward(grad_output, gbdim, x, xbdim, weight, wbdim, geometry)
    return weight_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call)


def weight_grad(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    call: Call,
) -> Batched:
    """`convolution_backward_weight_batch_rule` for operands that fit: nothing is checked."""
    batch = grad_output.shape[gbdim] if gbdim is not None else 1 if xbdim is None else x.shape[xbdim]
    if batch == 0:
        grad_output, x = with_one_entry(grad_output, gbdim), with_one_entry(x, xbdim)
        return without_entries(*weight_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call))
    if call.margins is not None:
        if call.transposed:
            grad_output, gbdim = call.padded(grad_output, gbdim)
        else:
            x, xbdim = call.padded(x, xbdim)
    groups = call.groups
    if gbdim is not None and xbdim is not None:
        # BN(GO) -> N(BGO), BN(GI) -> N(BGI), groups B*G: (BGO)I -> B(GO)I; transposed (BGI)O -> B(GI)O
        dummy = make_dummy(weight, wbdim, 0, batch)
        folded = reshape_dim_into(gbdim, 1, grad_output)
        grad = call.weight_grad(folded, reshape_dim_into(xbdim, 1, x), dummy, batch * groups)
        return reshape_dim_outof(0, batch, grad), 0
    if gbdim is not None:
        return _grad_output_batched(grad_output, gbdim, x, weight, wbdim, call, batch)
    if xbdim is not None:
        return _x_batched(grad_output, x, xbdim, weight, wbdim, call, batch)
    # the weight does not enter: N(GO), N(GI) -> (GO)I
    return call.weight_grad(grad_output, x, make_dummy(weight, wbdim, 0, batch), groups), None


def _grad_output_batched(
    grad_output: Tensor, gbdim: int, x: Tensor, weight: Tensor, wbdim: int | None, call: Call, batch: int
) -> Batched:
    groups = call.groups
    if groups == 1:
        # BNO -> N(BO), NI: (BO)I -> BOI; transposed I(BO) -> IBO
        axis = 1 if call.transposed else 0
        dummy = make_dummy(weight, wbdim, axis, batch)
        grad = call.weight_grad(reshape_dim_into(gbdim, 1, grad_output), x, dummy, 1)
        return reshape_dim_outof(axis, batch, grad), axis
    folded = _fold_inside_groups(grad_output, gbdim, groups)
    if call.transposed:
        # N(GBO), N(GI): (GI)(BO) -> (GI)BO
        dummy = make_dummy(weight, wbdim, 1, batch)
        return reshape_dim_outof(1, batch, call.weight_grad(folded, x, dummy, groups)), 1
    # N(GBO), N(GI): (GBO)I -> B(GO)I
    grad = call.weight_grad(folded, x, make_dummy(weight, wbdim, 0, batch), groups)
    return _unfold_inside_groups(grad, batch, groups), 0


def _x_batched(
    grad_output: Tensor, x: Tensor, xbdim: int, weight: Tensor, wbdim: int | None, call: Call, batch: int
) -> Batched:
    groups = call.groups
    if groups == 1:
        # NO, BNI -> N(BI): O(BI) -> OBI; transposed (BI)O -> BIO
        axis = 0 if call.transposed else 1
        dummy = make_dummy(weight, wbdim, axis, batch)
        grad = call.weight_grad(grad_output, reshape_dim_into(xbdim, 1, x), dummy, 1)
        return reshape_dim_outof(axis, batch, grad), axis
    folded = _fold_inside_groups(x, xbdim, groups)
    if call.transposed:
        # N(GO), N(GBI): (GBI)O -> B(GI)O
        grad = call.weight_grad(grad_output, folded, make_dummy(weight, wbdim, 0, batch), groups)
        return _unfold_inside_groups(grad, batch, groups), 0
    # N(GO), N(GBI): (GO)(BI) -> (GO)BI
    dummy = make_dummy(weight, wbdim, 1, batch)
    return reshape_dim_outof(1, batch, call.weight_grad(grad_output, folded, dummy, groups)), 1


def _fold_inside_groups(t: Tensor, bdim: int, groups: int) -> Tensor:
    """BN(GC) -> BNGC -> NG(BC) -> N(GBC)."""
    split = reshape_dim_outof(2, groups, move_batch_dim_to_front(t, bdim))
    return reshape_dim_into(0, 2, split).flatten(1, 2)


def _unfold_inside_groups(grad: Tensor, batch: int, groups: int) -> Tensor:
    """(GBC)D -> G(BC)D -> GBCD -> B(GC)D."""
    split = reshape_dim_outof(1, batch, reshape_dim_outof(0, groups, grad))
    return reshape_dim_into(0, 1, split)
