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

    def has_own_backward(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule.has_own_backward`; the sums it adds up would be too short in half precision."""
        return bool(x.numel()) and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)

    def forward_saving(
        self, module: Any, params: Mapping[str, Tensor | None], x: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Save the mean and the inverse deviation of every row and group."""
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), module.num_groups)
        out, *saved = torch.native_group_norm(
            x.contiguous(), params["weight"], params["bias"], *sizes, module.eps
        )
        return out, tuple(saved)

    def own_backward(
        self,
        module: Any,
        params: Mapping[str, Tensor | None],
        x: Tensor,
        saved: tuple[Tensor, ...],
        g: Tensor,
        *,
        to_input: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return the gradients of x, and of weight and bias for every row, `[(N K), C]`."""
        few = 1 < math.prod(x.shape[2:]) < FEW_POSITIONS
        backward = _backward_of_few_positions if few else _fused_backward
        mean, rstd = saved
        return backward(x, g, mean, rstd, params["weight"], to_input)

    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """See `LayerRule.grads`."""
        if not call.saved:
            return super().grads(call)
        by_row = dict(zip(("weight", "bias"), call.saved, strict=True))
        if call.rows_per_sample == 1:
            return {name: by_row[name] for name in call.wanted}
        return {name: sample_sum(call, by_row[name], keep=(1,)) for name in call.wanted}


FEW_POSITIONS = 8
"""Below, PyTorch's fused call takes two to three times as long: it adds up vectors, mostly of nothing."""


def _fused_backward(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, to_input: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Compute all in one call: of one sample with `N C` channels in `N G` groups, gradients are `[N C]`."""
    rows, channels = x.shape[:2]
    folded = (1, rows * channels, math.prod(x.shape[2:]))
    to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward.default(
        g.reshape(folded),
        x.reshape(folded),
        mean.view(1, -1),
        rstd.view(1, -1),
        None if weight is None else weight.expand(rows, -1).reshape(-1),
        *folded,
        mean.numel(),
        (to_input, True, True),
    )
    grads = to_weight.view(rows, channels), to_bias.view(rows, channels)
    return to_x.view(x.shape) if to_input else None, grads


def _backward_of_few_positions(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, to_input: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """As `_fused_backward`, in elementary operations.

    With y normalised, and h the gradient of y, of a group: x has `rstd (h - mean(h) - y mean(h y))`.
    """
    rows, channels = x.shape[:2]
    groups = mean.shape[1]

    def of_groups(t: Tensor) -> Tensor:
        return t.reshape(rows, groups, -1)

    y = (of_groups(x) - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    g = g.reshape(rows, channels, -1)
    to_weight, to_bias = (g * y.view(g.shape)).sum(2), g.sum(2)
    if not to_input:
        return None, (to_weight, to_bias)
    if weight is None:
        h, by_y, by_h = g, to_weight, to_bias
    else:
        h, by_y, by_h = g * weight.unsqueeze(1), to_weight * weight, to_bias * weight
    sum_hy, sum_h = (of_groups(t).sum(2, keepdim=True) for t in (by_y, by_h))
    part = 1 / y.shape[2]
    to_x = torch.sub(of_groups(h), sum_h, alpha=part).addcmul_(y, sum_hy, value=-part)
    to_x = to_x.mul_(rstd.unsqueeze(2))
    return to_x.view(x.shape), (to_weight, to_bias)


class InstanceNorm(_Channels):
    """`nn.InstanceNorm1d`, `2d`, `3d`; running statistics only in evaluation mode."""

    def input_error(self, module: Any, x: Tensor) -> str | None:
        """Ask for a batch axis, which the layer itself does not."""
        unbatched = module._get_no_batch_dim()
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

    def input_error(self, module: Any, x: Tensor) -> str | None:
        """Ask for an axis before the normalised ones, the batch."""
        inner = len(module.normalized_shape)
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
