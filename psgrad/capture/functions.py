"""Functions of a batch and a weight, such as `F.conv2d`, as layers with a rule that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.layers import RULES, LayerRule
from psgrad.layers.grouped_linear import GroupedLinear, grouped_linear
from psgrad.layers.linear import TransposedLinear

__all__ = ["BY_OFFSETS", "FORMULAS", "FUNCTIONS", "FunctionCall", "bound", "layer_like"]


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function, its arguments by what they are to a layer.

    Attributes
    ----------
    rule
        Of the layer.
    settings
        A layer without values.
    x, weight, bias
        What it was called with.

    """

    rule: LayerRule
    settings: nn.Module
    x: Any
    weight: Any
    bias: Any


def bound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> FunctionCall | str:
    """Return the call of one of `FUNCTIONS`, or why no layer computes the same."""
    try:
        named = {"x" if name == "input" else name: value for name, value in kwargs.items()}
        call: FunctionCall = FUNCTIONS[func](*args, **named)
    except (TypeError, ValueError, RuntimeError) as error:  # of arguments that no such layer takes
        return str(error)
    return call.rule.refusal(call.settings) or call


def layer_like(settings: nn.Module, **parameters: nn.Parameter | None) -> nn.Module:
    """Return a layer of these settings and parameters."""
    layer = settings.__new__(type(settings))
    layer.__dict__.update(settings.__dict__)
    layer.__dict__["_parameters"] = parameters
    return layer


class _WithoutValues:
    """Layers that only tell settings draw none."""

    def reset_parameters(self) -> None:
        """Leave them."""


@lru_cache(maxsize=4096)
def _settings(kind: Any, *args: Any, **options: Any) -> nn.Module:
    return type(kind.__name__, (_WithoutValues, kind), {})(*args, **options)


def _several(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _linear(x: Any, weight: Any, bias: Any = None) -> FunctionCall:
    return FunctionCall(RULES[nn.Linear], _settings(nn.Module), x, _matrix(weight), bias)


def _matmul(x: Any, other: Any) -> FunctionCall:
    return FunctionCall(_TRANSPOSED, _settings(nn.Module), x, _matrix(other), None)


def _mm(x: Any, mat2: Any) -> FunctionCall:
    return _matmul(x, mat2)


def _matrix(weight: Any) -> Any:
    if weight.ndim != 2:
        raise ValueError(f"a product with a weight of {weight.ndim} axes")
    return weight


_TRANSPOSED = TransposedLinear()


def _grouped_linear(x: Any, weight: Any) -> FunctionCall:
    return FunctionCall(_GROUPED, _settings(nn.Module), x, weight, None)


_GROUPED = GroupedLinear()


def _conv(
    kind: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> FunctionCall:
    outputs, each = weight.shape[:2]
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return _convolution(kind, (each * groups, outputs), x, weight, bias, groups, options)


def _conv_transpose(
    kind: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> FunctionCall:
    inputs, each = weight.shape[:2]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    return _convolution(kind, (inputs, each * groups), x, weight, bias, groups, options)


def _convolution(
    kind: Any,
    channels: tuple[int, int],
    x: Any,
    weight: Any,
    bias: Any,
    groups: int,
    options: dict[str, Any],
) -> FunctionCall:
    hashable = {name: _several(value) for name, value in options.items()}
    layer = _settings(kind, *channels, tuple(weight.shape[2:]), groups=groups, device="meta", **hashable)
    return FunctionCall(RULES[kind], layer, x, weight, bias)


def _layer_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> FunctionCall:
    layer = _settings(nn.LayerNorm, tuple(normalized_shape), eps, elementwise_affine=False)
    return FunctionCall(RULES[nn.LayerNorm], layer, x, weight, bias)


def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> FunctionCall:
    layer = _settings(nn.RMSNorm, tuple(normalized_shape), eps, elementwise_affine=False)
    return FunctionCall(RULES[nn.RMSNorm], layer, x, weight, None)


def _group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> FunctionCall:
    layer = _settings(nn.GroupNorm, num_groups, x.shape[1], eps, affine=False)
    return FunctionCall(RULES[nn.GroupNorm], layer, x, weight, bias)


def _batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> FunctionCall:
    if training or running_mean is None or running_var is None:
        raise ValueError("batch_norm normalises each sample with the statistics of the whole batch")
    layer = layer_like(_settings(nn.BatchNorm1d, x.shape[1], eps, affine=False, track_running_stats=False))
    layer._buffers = {"running_mean": running_mean, "running_var": running_var}
    return FunctionCall(RULES[nn.BatchNorm1d], layer, x, weight, bias)


def _embedding(
    x: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> FunctionCall:
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq)
    layer = _settings(nn.Embedding, *weight.shape, *options, device="meta")
    return FunctionCall(RULES[nn.Embedding], layer, x, weight, None)


FUNCTIONS: dict[Any, Callable[..., FunctionCall]] = {
    F.linear: _linear,
    grouped_linear: _grouped_linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    F.conv1d: partial(_conv, nn.Conv1d),
    F.conv2d: partial(_conv, nn.Conv2d),
    F.conv3d: partial(_conv, nn.Conv3d),
    F.conv_transpose1d: partial(_conv_transpose, nn.ConvTranspose1d),
    F.conv_transpose2d: partial(_conv_transpose, nn.ConvTranspose2d),
    F.conv_transpose3d: partial(_conv_transpose, nn.ConvTranspose3d),
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
}
"""By torch's function: takes its arguments. Another one is a line here, if its layer has a rule."""


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """..I, ..J, O I J -> ..O."""
    pairs = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return F.linear(pairs.flatten(-2), weight.flatten(1), bias)


BY_OFFSETS = (
    "got offsets, and so rows that are words and not samples: give it a bag in each row, filled up with its "
    "padding_idx"
)


def _embedding_bag(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """..T -> ..D, a bag in each row.

    Raises
    ------
    ValueError
        If it is given offsets.

    """
    if offsets is not None or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"embedding_bag {BY_OFFSETS}")
    looked_up = F.embedding(x, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        counted = torch.ones_like(x, dtype=torch.bool)
    else:
        counted = x != (padding_idx % weight.shape[0])
    counted = counted.unsqueeze(-1)
    if mode == "max":
        largest = looked_up.masked_fill(~counted, -torch.inf).max(-2).values
        return largest.masked_fill(~counted.any(-2), 0)
    if per_sample_weights is not None:
        looked_up = looked_up * per_sample_weights.unsqueeze(-1)
    total = looked_up.masked_fill(~counted, 0).sum(-2)
    return total if mode == "sum" else total / counted.sum(-2).clamp(min=1)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """N C.., C -> N C..: another slope below 0 in each channel, or one in all."""
    slope = weight if weight.numel() == 1 else weight.reshape(-1, *(1,) * (x.ndim - 2))
    return torch.where(x > 0, x, slope * x)


def _addcmul(
    input: Tensor,  # noqa: A002  # torch's name, by which it may be given
    tensor1: Tensor,
    tensor2: Tensor,
    *,
    value: float = 1,
) -> Tensor:
    """As `torch.addcmul`: an affine map of every channel, with the batch in any place."""
    product = tensor1 * tensor2
    return input + (product if value == 1 else value * product)


FORMULAS: dict[Any, Callable[..., Tensor]] = {
    torch.addcmul: _addcmul,
    F.bilinear: _bilinear,
    F.embedding_bag: _embedding_bag,
    F.prelu: _prelu,
}
"""By torch's function: the same in terms of `FUNCTIONS`."""
