"""The rule of `aten::convolution`: six cases of batched operands, and the bias."""

from __future__ import annotations

from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.layout import move_batch_dim_to_front, reshape_dim_into, reshape_dim_outof
from psgrad.conv.rules.call import Batched, Call, batch_length, with_one_entry, without_entries
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
        out, out_bdim = convolution(x, x_bdim, weight, weight_bdim, None, None, call)
        return _add_bias(out, out_bdim, bias, bias_bdim)
    if batch_length((x, x_bdim), (weight, weight_bdim)) == 0:
        x, weight = with_one_entry(x, x_bdim), with_one_entry(weight, weight_bdim)
        return without_entries(*convolution(x, x_bdim, weight, weight_bdim, bias, None, call))
    if call.margins is None:
        return _convolve(x, x_bdim, weight, weight_bdim, bias, call)
    if call.transposed:
        out, out_bdim = _convolve(x, x_bdim, weight, weight_bdim, bias, call)
        return call.cropped(out), out_bdim
    x, x_bdim = call.padded(x, x_bdim)
    return _convolve(x, x_bdim, weight, weight_bdim, bias, call)


def _convolve(
    x: Tensor,
    x_bdim: int | None,
    weight: Tensor,
    weight_bdim: int | None,
    bias: Tensor | None,
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
    if x_bdim is not None:
        # BN(GI) -> N(BGI), B(GO)I -> (BGO)I, groups B*G: N(BGO) -> NB(GO); transposed B(GI)O -> (BGI)O
        folded = reshape_dim_into(weight_bdim, 0, weight)
        out = call.convolve(reshape_dim_into(x_bdim, 1, x), folded, None, batch * groups)
        return reshape_dim_outof(1, batch, out), 1
    if groups == 1:
        # NI, BOI -> (BO)I: N(BO) -> NBO; transposed BIO -> I(BO)
        folded = reshape_dim_into(weight_bdim, 1 if call.transposed else 0, weight)
        return reshape_dim_outof(1, batch, call.convolve(x, folded, None, 1)), 1
    if call.transposed:
        # B(GI)O -> (GI)(BO)
        folded = reshape_dim_into(weight_bdim, 1, weight)
    else:
        # B(GO)I -> BGOI -> G(BO)I -> (GBO)I
        split = reshape_dim_outof(1, groups, move_batch_dim_to_front(weight, weight_bdim))
        folded = reshape_dim_into(0, 1, split).flatten(0, 1)
    # N(GI), either weight: N(GBO) -> NG(BO) -> NGBO -> NB(GO)
    out = reshape_dim_outof(1, groups, call.convolve(x, folded, None, groups))
    return reshape_dim_into(1, 2, reshape_dim_outof(2, batch, out)), 1


def _add_bias(out: Tensor, out_bdim: int | None, bias: Tensor, bias_bdim: int | None) -> Batched:
    """Add a bias that is batched, or whose convolution has a batched weight.

    `NB(GO)` or `N(GO)`, and `B(GO)` or `(GO)`: both with `B` in front, the bias as `[B?, C, 1, ..]`
    behind a sample axis of its own, so that they broadcast on the logical rank.

    Raises
    ------
    ShapeError
        If the bias is not one element per channel, which broadcasting would let pass.

    """
    out = move_batch_dim_to_front(out, out_bdim)
    bias = move_batch_dim_to_front(bias, bias_bdim)
    rank = out.ndim - 2 - (out_bdim is not None)
    channels = out.shape[-rank - 1]
    if bias.shape[-1] != channels or bias.ndim != 1 + (bias_bdim is not None):
        raise ShapeError(f"bias {tuple(bias.shape)} for an output {tuple(out.shape)} of {channels} channels")
    # B(GO) -> B 1 (GO) 1.., (GO) -> (GO) 1..
    shape = (channels, *(1,) * rank)
    bias = bias.reshape(shape) if bias_bdim is None else bias.reshape(bias.shape[0], 1, *shape)
    return out + bias, 0
