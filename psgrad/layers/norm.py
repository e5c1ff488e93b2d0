"""Normalisation layers with an elementwise affine map: `y = weight * normalised(x) + bias`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.layers.base import LayerCall, LayerRule, sample_sum

__all__ = ["BatchNormEval", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Affine(LayerRule):
    """Sums of `g * normalised(x)` and of `g` over a sample's rows and the axes that the affine map shares."""

    @abstractmethod
    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """Return the layer's output without its affine map."""

    @abstractmethod
    def kept_axes(self, module: Any, x: Tensor) -> tuple[int, ...]:
        """Return the axes of x along which the affine map has an entry each."""

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        keep = self.kept_axes(call.module, call.x)
        grads = {}
        if "weight" in call.wanted:
            # in the dtype the layer ran in, which is that of its output
            normalised = self.normalised(call.module, call.x.to(call.g.dtype))
            grads["weight"] = sample_sum(call, call.g * normalised, keep)
        if "bias" in call.wanted:
            grads["bias"] = sample_sum(call, call.g, keep)
        return grads


class _Channels(_Affine):
    """Affine map with an entry per channel, axis 1."""

    def input_error(self, module: nn.Module, x: Tensor) -> str | None:
        """Ask for a batch and a channel axis."""
        return None if x.ndim >= 2 else f"the input has {x.ndim} axis, a batch has at least 2"

    def kept_axes(self, module: Any, x: Tensor) -> tuple[int, ...]:
        """See `_Affine.kept_axes`."""
        return (1,)


class GroupNorm(_Channels):
    """`nn.GroupNorm`."""

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        return torch.group_norm(x, module.num_groups, params["weight"], params["bias"], module.eps)

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """See `_Affine.normalised`."""
        return torch.group_norm(x, module.num_groups, None, None, module.eps)

    def forward_saving(
        self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Save the mean and the inverse deviation of every row and group."""
        if not x.numel() or x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
            return super().forward_saving(module, params, x, *args)
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), module.num_groups)
        weight, bias = params["weight"], params["bias"]
        out, *saved = torch.native_group_norm(x.contiguous(), weight, bias, *sizes, module.eps)
        return out, tuple(saved)

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`.

        Of one sample with `N C` channels in `N G` groups the ordinary gradient is `[N C]`: one fused call.
        It subtracts a mean, for which half precision would be too little.
        """
        if not call.saved or call.g.dtype != call.x.dtype:
            return super().grads(call)
        by_row = _of_few_positions if 1 < math.prod(call.x.shape[2:]) < FEW_POSITIONS else _fused
        grads = dict(zip(("weight", "bias"), by_row(call), strict=True))
        if call.rows_per_sample == 1:
            return {name: grads[name] for name in call.wanted}
        return {name: sample_sum(call, grads[name], keep=(1,)) for name in call.wanted}


FEW_POSITIONS = 8
"""Below, PyTorch's fused call takes three times as long: it adds up vectors, mostly of nothing."""


def _fused(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias `[(N K), C]`, in one call."""
    rows, channels = call.x.shape[:2]
    folded = (1, rows * channels, math.prod(call.x.shape[2:]))
    mean, rstd = (t.view(1, -1) for t in call.saved)
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        call.g.reshape(folded),
        call.x.reshape(folded),
        mean,
        rstd,
        None,
        *folded,
        mean.shape[1],
        (False, True, True),
    )
    return weight.view(rows, channels), bias.view(rows, channels)


def _of_few_positions(call: LayerCall) -> tuple[Tensor, Tensor]:
    """As `_fused`, in elementary operations."""
    rows, channels = call.x.shape[:2]
    mean, rstd = (t.unsqueeze(2) for t in call.saved)
    normalised = ((call.x.reshape(rows, mean.shape[1], -1) - mean) * rstd).view(rows, channels, -1)
    g = call.g.reshape(rows, channels, -1)
    return (g * normalised).sum(2), g.sum(2)


class InstanceNorm(_Channels):
    """`nn.InstanceNorm1d`, `2d`, `3d`; running statistics only in evaluation mode."""

    def input_error(self, module: nn.Module, x: Tensor) -> str | None:
        """Ask for a batch axis, which the layer itself does not."""
        unbatched = module._get_no_batch_dim()  # type: ignore[operator]  # a method of _InstanceNorm
        return f"the input has {x.ndim} axes, a batch has {x.ndim + 1}" if x.ndim == unbatched else None

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        return self._instance_norm(module, x, params["weight"], params["bias"])

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """See `_Affine.normalised`."""
        return self._instance_norm(module, x, None, None)

    @staticmethod
    def _instance_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        from_input = module.training or not module.track_running_stats
        return F.instance_norm(
            x,
            None if from_input else module.running_mean.to(x.dtype),
            None if from_input else module.running_var.to(x.dtype),
            weight,
            bias,
            from_input,
            0.0,
            module.eps,
        )


class BatchNormEval(_Channels):
    """`nn.BatchNorm1d`, `2d`, `3d` in evaluation mode, where the statistics are constants."""

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        return F.batch_norm(
            x,
            module.running_mean,
            module.running_var,
            params["weight"],
            params["bias"],
            training=False,
            eps=module.eps,
        )

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """See `_Affine.normalised`."""
        mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return F.batch_norm(x, mean, var, training=False, eps=module.eps)


class _Trailing(_Affine):
    """Affine map with an entry per element of the trailing `normalized_shape`."""

    def input_error(self, module: nn.Module, x: Tensor) -> str | None:
        """Ask for an axis before the normalised ones, the batch."""
        inner = len(module.normalized_shape)  # type: ignore[arg-type]  # a tuple on both layers
        return None if x.ndim > inner else f"the input has {x.ndim} axes, a batch has at least {inner + 1}"

    def kept_axes(self, module: Any, x: Tensor) -> tuple[int, ...]:
        """See `_Affine.kept_axes`."""
        return tuple(range(x.ndim - len(module.normalized_shape), x.ndim))


class LayerNorm(_Trailing):
    """`nn.LayerNorm`."""

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        return F.layer_norm(x, module.normalized_shape, params["weight"], params["bias"], module.eps)

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """See `_Affine.normalised`."""
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


class RMSNorm(_Trailing):
    """`nn.RMSNorm`."""

    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """See `LayerRule.forward`."""
        return F.rms_norm(x, module.normalized_shape, params["weight"], module.eps)

    def normalised(self, module: Any, x: Tensor) -> Tensor:
        """See `_Affine.normalised`."""
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
