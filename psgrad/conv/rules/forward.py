"""The rule of `aten::convolution`: six cases of batched operands, and the bias."""

from __future__ import annotations

from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.layout import move_batch_dim_to_front, reshape_dim_into, reshape_dim_outof
from psgrad.conv.rules.call import Batched, Call, is_recorded, with_one_entry, without_entries
from psgrad.conv.rules.checks import check_forward
from psgrad.errors import ShapeError

__all__ = ["_convolution_batch_rule", "convolution", "convolution_batch_rule"]


def convolution_batch_rule(
    x: Tensor,
    x_bdim: int | None,
    weight: Tensor,
    weight_bdim: int | None,
    bias: Tensor | None,
    bias_bdim: int | None,
    geometry: ConvGeometry,
) -> Batched:
    """Convolve every entry of `B`, in one call of the operator.

    Parameters
    ----------
    x
        `N(GI)` and spatial axes, with `B` at `x_bdim`.
    weight
        `(GO)I` and kernel axes, transposed `(GI)O`, with `B` at `weight_bdim`.
    bias
        `(GO)`, with `B` at `bias_bdim`; or None.
    x_bdim, weight_bdim, bias_bdim
        Position of `B`, negative ones counted from the end; None where there is none.
    geometry
        Of the convolution; padding may differ before and after.

    Returns
    -------
    tuple of Tensor and (int or None)
        `N(GO)` and spatial axes with `B` at the position given with it: 0 if x alone is batched or a
        bias was added apart, 1 if the weight is batched, None if nothing is. Differentiable.

    Raises
    ------
    ShapeError
        If shapes, bdims or the geometry do not fit; the message has the shapes.

    """
    x_bdim, weight_bdim, bias_bdim, call = check_forward(
        x, x_bdim, weight, weight_bdim, bias, bias_bdim, geometry
    )
    return convolution(x, x_bdim, weight, weight_bdim, bias, bias_bdim, call)


def _convolution_batch_rule(
    x: Tensor,
    x_bdim: int | None,
    weight: Tensor,
    weight_bdim: int | None,
    bias: Tensor | None,
    bias_bdim: int | None,
    geometry: ConvGeometry,
    benchmark: bool = False,
    deterministic: bool = False,
    cudnn_enabled: bool = True,
    allow_tf32: bool = True,
) -> Batched:
    """Do what `convolution_batch_rule` does; the backend flags are accepted and dropped.

    The flags in force are those of `torch.backends.cudnn`, which the operator reads itself.
    """
    return convolution_batch_rule(x, x_bdim, weight, weight_bdim, bias, bias_bdim, geometry)


def convolution(
    x: Tensor,
    x_bdim: int | None,
    weight: Tensor,
    weight_bdim: int | None,
    bias: Tensor | None,
    bias_bdim: int | None,
    call: Call,
) -> Batched:
    """`convolution_batch_rule` for operands that fit: bdims from the front, nothing is checked."""
    if bias is not None and (weight_bdim is not None or bias_bdim is not None):
        _check_bias(bias, bias_bdim, weight, weight_bdim, call)
        if weight_bdim is None or call.transposed:  # there an addition is faster than the operator's own
            out, out_bdim = convolution(x, x_bdim, weight, weight_bdim, None, None, call)
            return _add_bias(out, out_bdim, bias, bias_bdim)
    if weight_bdim is not None:
        empty = weight.shape[weight_bdim] == 0
    else:
        empty = x_bdim is not None and x.shape[x_bdim] == 0
    if empty:
        x, weight = with_one_entry(x, x_bdim), with_one_entry(weight, weight_bdim)
        bias = None if bias is None else with_one_entry(bias, bias_bdim)
        return without_entries(*convolution(x, x_bdim, weight, weight_bdim, bias, bias_bdim, call))
    if call.margins is not None and not call.transposed:
        x, x_bdim = call.padded(x, x_bdim)
    out, out_bdim = _convolve(x, x_bdim, weight, weight_bdim, bias, bias_bdim, call)
    if call.margins is not None and call.transposed:
        out = call.cropped(out)
    if bias is None or weight_bdim is None:
        return out, out_bdim
    return out.movedim(1, 0), 0


def _convolve(
    x: Tensor,
    x_bdim: int | None,
    weight: Tensor,
    weight_bdim: int | None,
    bias: Tensor | None,
    bias_bdim: int | None,
    call: Call,
) -> Batched:
    groups = call.groups
    if weight_bdim is None:
        if x_bdim is None:
            return call.convolve(x, weight, bias, groups), None
        # BNI -> (BN)I, OI -> (BN)O -> BNO
        batch = x.shape[x_bdim]
        out = call.convolve(reshape_dim_into(x_bdim, 0, x), weight, bias, groups)
        return reshape_dim_outof(0, batch, out), 0

    batch = weight.shape[weight_bdim]
    if bias is not None:
        bias = move_batch_dim_to_front(bias, bias_bdim) if bias_bdim is not None else bias.expand(batch, -1)
        if x_bdim is None and groups > 1:
            # B(GO) -> GBO, the order of the channels below
            bias = bias.unflatten(1, (groups, -1)).movedim(0, 1)
        bias = bias.reshape(-1)
    if x_bdim is not None:
        # BN(GI) -> N(BGI), B(GO)I -> (BGO)I, groups B*G: N(BGO) -> NB(GO); transposed B(GI)O -> (BGI)O
        folded = reshape_dim_into(weight_bdim, 0, weight)
        out = call.convolve(reshape_dim_into(x_bdim, 1, x), folded, bias, batch * groups)
        return reshape_dim_outof(1, batch, out), 1
    if groups == 1:
        # NI, BOI -> (BO)I: N(BO) -> NBO; transposed BIO -> I(BO)
        folded = reshape_dim_into(weight_bdim, 1 if call.transposed else 0, weight)
        return reshape_dim_outof(1, batch, call.convolve(x, folded, bias, 1)), 1
    if call.transposed:
        # B(GI)O -> (GI)(BO)
        folded = reshape_dim_into(weight_bdim, 1, weight)
    else:
        # B(GO)I -> BGOI -> G(BO)I -> (GBO)I
        split = reshape_dim_outof(1, groups, move_batch_dim_to_front(weight, weight_bdim))
        folded = reshape_dim_into(0, 1, split).flatten(0, 1)
    # N(GI), either weight: N(GBO) -> NG(BO) -> NGBO -> NB(GO)
    out = reshape_dim_outof(1, groups, call.convolve(x, folded, bias, groups))
    return reshape_dim_into(1, 2, reshape_dim_outof(2, batch, out)), 1


def _check_bias(
    bias: Tensor, bias_bdim: int | None, weight: Tensor, weight_bdim: int | None, call: Call
) -> None:
    """See that the bias has one element per channel, which broadcasting would let pass.

    Raises
    ------
    ShapeError
        If it has not.

    """
    outputs = 1 if call.transposed else 0
    channels = weight.shape[outputs + (weight_bdim is not None and weight_bdim <= outputs)]
    if call.transposed:
        channels *= call.groups
    if bias.ndim != 1 + (bias_bdim is not None) or bias.shape[-1 if bias_bdim != 1 else 0] != channels:
        raise ShapeError(f"bias {tuple(bias.shape)} for an output of {channels} channels")


def _add_bias(out: Tensor, out_bdim: int | None, bias: Tensor, bias_bdim: int | None) -> Batched:
    """Add a bias to an output of ours, in place where nobody records it.

    `NB(GO)` or `N(GO)`, and `B(GO)` or `(GO)`: both with `B` in front, the bias as `[B?, C, 1, ..]`
    behind a sample axis of its own, so that they broadcast on the logical rank.
    """
    out = move_batch_dim_to_front(out, out_bdim)
    rank = out.ndim - 2 - (out_bdim is not None)
    bias = move_batch_dim_to_front(bias, bias_bdim)
    shape = (bias.shape[-1], *(1,) * rank)
    bias = bias.reshape(shape if bias_bdim is None else (bias.shape[0], 1, *shape))
    if out_bdim is None or out.dtype != bias.dtype or is_recorded(out, bias):
        return out + bias, 0
    return out.add_(bias), 0
