"""Convolutions and transposed convolutions, 1-, 2- and 3-D, through `psgrad.conv`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from psgrad.conv import (
    ConvGeometry,
    clipping_keeps_grads,
    kept_weight_grads,
    weight_grad_sq_norms,
    weight_grad_sq_norms_and_sum,
    weight_grads,
    weighted_weight_grad,
)
from psgrad.layers.base import LayerCall, LayerRule, drop_removed, per_row, sample_sum, squared_norms

__all__ = ["Convolution", "TransposedConvolution"]


class Convolution(LayerRule):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with every padding mode."""

    output_axis: ClassVar[int | None] = 1

    def input_error(self, module: Any, x: Tensor) -> str | None:
        """Ask for a batch axis, which the layer itself does not."""
        expected = len(module.kernel_size) + 2
        return None if x.ndim == expected else f"the input has {x.ndim} axes, a batch has {expected}"

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        return module._conv_forward(x, params["weight"], params["bias"])

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        return self._grads(call, weight_grads)

    def kept_grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.kept_grads`."""
        return self._grads(call, kept_weight_grads)

    @staticmethod
    def _grads(call: LayerCall, of_weight: Callable[..., Tensor]) -> dict[str, Tensor]:
        grads = {}
        if "weight" in call.wanted:
            x, shape, geometry = _operands(call)
            grads["weight"] = of_weight(x, call.g, shape, geometry, rows_per_sample=call.rows_per_sample)
        if "bias" in call.wanted:
            grads["bias"] = sample_sum(call, call.g, keep=(1,))
        return grads

    def sq_norms(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.sq_norms`."""
        norms = {}
        if "weight" in call.wanted:
            x, shape, geometry = _operands(call)
            norms["weight"] = weight_grad_sq_norms(
                x, call.g, shape, geometry, rows_per_sample=call.rows_per_sample
            )
        if "bias" in call.wanted:
            norms["bias"] = squared_norms(sample_sum(call, call.g, keep=(1,)))
        return norms

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """See `LayerRule.weighted_sum`."""
        sums = {}
        if "weight" in call.wanted:
            x, shape, geometry = _operands(call)
            sums["weight"] = weighted_weight_grad(
                x, call.g, shape, geometry, factors, rows_per_sample=call.rows_per_sample
            )
        if "bias" in call.wanted:
            g = drop_removed(call.g, factors, call.rows_per_sample)
            g = g * per_row(factors, g, call.rows_per_sample)
            sums["bias"] = g.sum([axis for axis in range(g.ndim) if axis != 1])
        return sums

    def norms_and_sums(self, call: LayerCall) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """See `LayerRule.norms_and_sums`."""
        if "weight" not in call.wanted or call.samples == 0:
            return None
        norms, sums = {}, {}
        x, shape, geometry = _operands(call)
        norms["weight"], sums["weight"] = weight_grad_sq_norms_and_sum(
            x, call.g, shape, geometry, rows_per_sample=call.rows_per_sample
        )
        if "bias" in call.wanted:
            bias = sample_sum(call, call.g, keep=(1,))
            norms["bias"], sums["bias"] = squared_norms(bias), bias.sum(0)
        return norms, sums

    def keeps_grads(self, call: LayerCall) -> bool:
        """See `LayerRule.keeps_grads`: whichever is faster, if it is not four times the memory."""
        if "weight" not in call.wanted or call.samples == 0:
            return True
        x, shape, geometry = _operands(call)
        if call.samples * math.prod(shape) > 4 * (call.x.numel() + call.g.numel()):
            return False
        return clipping_keeps_grads(x, call.g, shape, geometry, rows_per_sample=call.rows_per_sample)


class TransposedConvolution(Convolution):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`."""

    output_axis: ClassVar[int | None] = None

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`; the optional argument is the layer's `output_size`."""
        rank = len(module.kernel_size)
        weight = params["weight"]
        assert weight is not None
        output_padding = module._output_padding(
            x,
            list(args[0]) if args and args[0] is not None else None,
            list(module.stride),
            list(module.padding),
            list(module.kernel_size),
            rank,
            list(module.dilation),
        )
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
        return function(
            x,
            weight,
            params["bias"],
            module.stride,
            module.padding,
            output_padding,
            module.groups,
            module.dilation,
        )


def _operands(call: LayerCall) -> tuple[Tensor, tuple[int, ...], ConvGeometry]:
    """Return the convolution's real input in the dtype of g, its weight shape and its geometry."""
    module: Any = call.module
    x = call.x.to(call.g.dtype)
    geometry = ConvGeometry.from_module(module)
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    if module.transposed:
        geometry = _with_output_padding(geometry, x, call.g)
    return x, tuple(module.weight.shape), geometry


def _with_output_padding(geometry: ConvGeometry, x: Tensor, g: Tensor) -> ConvGeometry:
    """Return the geometry that makes the output as large as g: `output_size` was the caller's to choose."""
    plain = ConvGeometry(
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        transposed=True,
        groups=geometry.groups,
    )
    extra = [have - least for have, least in zip(g.shape[2:], plain.output_size(x.shape[2:]), strict=True)]
    return ConvGeometry(
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        transposed=True,
        output_padding=extra,
        groups=geometry.groups,
    )
