"""The convolution of K members in folded layout: one grouped call for all."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv import ConvGeometry, convolution_batch_rule

__all__ = ["member_convolution"]


def member_convolution(folded: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Convolve every member's input with its own weight: `N(KGI)`, `K(GO)I` to `N(KGO)`.

    Parameters
    ----------
    folded
        `N(KGI)` and spatial axes.
    weight
        `K(GO)I` and kernel axes, transposed `K(GI)O`.
    bias
        `K(GO)`, or None.
    geometry
        Of one member's convolution.

    """
    geometry = geometry.at(weight.shape[3:])
    members = weight.shape[0]
    if geometry.is_padding_symmetric:
        return torch.convolution(
            folded,
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            geometry.stride,
            geometry.symmetric_padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding,
            members * geometry.groups,
        )
    # "same" with an even kernel: N(KGI) -> NK(GI), K(GO)I -> KN(GO) -> N(KGO)
    split = folded.unflatten(1, (members, -1))
    out, bdim = convolution_batch_rule(split, 1, weight, 0, bias, None if bias is None else 0, geometry)
    return out.movedim(bdim or 0, 1).flatten(1, 2)
