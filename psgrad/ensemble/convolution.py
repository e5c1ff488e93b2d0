"""The convolution of K members in folded layout: one grouped call, or K calls, for each of three results.

The forward pass, the gradient of the input and that of the weight are planned each for itself: oneDNN's
grouped kernels win when a call is small, its ordinary ones when channels are few and the batch is long.
"""

from __future__ import annotations

from torch import Tensor

from psgrad.conv import ConvGeometry, convolution_batch_rule

__all__ = ["member_convolution"]


def member_convolution(
    folded: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> tuple[Tensor, str, str]:
    """Convolve `N(KGI)` with `K(GO)I` to `N(KGO)`; also how, and why."""
    members = weight.shape[0]
    out, bdim = convolution_batch_rule(folded.unflatten(1, (members, -1)), 1, weight, 0, None, None, geometry)
    result = out.movedim(bdim or 0, 1).flatten(1, 2)
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * (result.ndim - 2))
    return result, "grouped", f"{members * geometry.groups} groups"
