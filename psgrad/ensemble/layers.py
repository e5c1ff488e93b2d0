"""Rules of `torch.nn` modules whose parameters are stacked: one call for all K members.

A rule gets the module, the members' random streams and the input. It returns what it computed and how, or a
string: why the members have to run one after the other there. Every rule keeps members apart bitwise where
the member alone would: no value of one member enters an operation with another's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.conv import ConvGeometry, convolution_batch_rule
from psgrad.ensemble.convolution import member_convolution
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.ensemble.value import Layout, Value

__all__ = ["MODULE_RULES", "Computed", "draw_dropout"]


@dataclass(frozen=True)
class Computed:
    """A layer's output, and how it was computed: for the plan."""

    value: Value
    strategy: str
    why: str


Rule = Callable[[Any, MemberRandomness, Value], Computed | str]


def _conv(module: nn.modules.conv._ConvNd, _: MemberRandomness, x: Value) -> Computed | str:
    geometry = ConvGeometry.from_module(module)
    dims = len(module.kernel_size)
    if x.rank != dims + 2:
        return "the input has no batch axis"
    members, weight, bias = x.members, module.weight, module.bias
    if x.layout is Layout.SHARED:
        shared = x.tensor
        if module.padding_mode != "zeros":
            shared = F.pad(shared, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        if module.groups == 1 and not module.transposed and isinstance(module.padding, tuple):
            padding = module.padding if module.padding_mode == "zeros" else (0,) * dims
            convolve = _CONVOLVE[dims]
            out = convolve(
                shared,
                weight.flatten(0, 1),
                None if bias is None else bias.flatten(),
                module.stride,
                padding,
                module.dilation,
            )
            return Computed(Value.folded(out, members), "one convolution", "K*O outputs over shared data")
        # N(GI), K(GO)I -> N K(GO)
        out, bdim = convolution_batch_rule(shared, None, weight, 0, None, None, geometry)
        folded = out.movedim(bdim or 0, 1).flatten(1, 2)
        if bias is not None:
            folded = folded + bias.reshape(-1, *(1,) * dims)
        return Computed(Value.folded(folded, members), "one convolution", "shared data")
    folded = x.as_folded()
    if module.padding_mode != "zeros":
        folded = F.pad(folded, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    out = member_convolution(folded, weight, bias, geometry)
    return Computed(Value.folded(out, members), "grouped", f"{members * module.groups} groups")


_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _linear(module: nn.Linear, _: MemberRandomness, x: Value) -> Computed | str:
    weight, bias, members = module.weight, module.bias, x.members
    if x.layout is Layout.SHARED:
        # .. F, (KO)F -> .. (KO)
        out = F.linear(x.tensor, weight.flatten(0, 1), None if bias is None else bias.flatten())
        if x.rank == 2:
            return Computed(Value.folded(out, members), "one product", "K*O outputs over shared data")
        split = out.unflatten(-1, (members, -1)).movedim(-2, 0)
        return Computed(Value.stacked(split), "one product", "K*O outputs over shared data")
    stacked = x.as_stacked()
    rows = stacked if x.rank == 2 else stacked.reshape(members, -1, stacked.shape[-1])
    out = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    if x.rank != 2:
        out = out.reshape(*stacked.shape[:-1], out.shape[-1])
    return Computed(Value.stacked(out), "bmm", "K products of the same shape")


def _embedding(module: nn.Embedding, _: MemberRandomness, x: Value) -> Computed | str:
    if module.padding_idx is not None or module.max_norm is not None:
        return "padding_idx and max_norm act on one member's table"
    if module.sparse or module.scale_grad_by_freq:
        return "its gradient is sparse or scaled by frequency"
    weight, index = module.weight, x.tensor
    members, rows = weight.shape[:2]
    # an index out of range must not reach the next member's rows
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise IndexError(
            f"index out of range: {int(index.min())} to {int(index.max())}, table of {rows} rows"
        )
    stacked = x.as_stacked()
    offsets = torch.arange(members, device=index.device).mul(rows).reshape(-1, *(1,) * x.rank)
    out = F.embedding(stacked + offsets, weight.flatten(0, 1))
    return Computed(Value.stacked(out), "gather", "K tables as one")


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, _: MemberRandomness, x: Value) -> Computed | str:
    if x.rank < 2:
        return "the input has no channels"
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        if module.momentum is None and len(set(module.num_batches_tracked.tolist())) != 1:
            return "members average over different numbers of batches"
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / int(module.num_batches_tracked[0])
    own = module.training or module.running_mean is None
    tracked = not module.training or module.track_running_stats
    out = F.batch_norm(
        x.as_folded(),
        _flat(module.running_mean) if tracked else None,
        _flat(module.running_var) if tracked else None,
        _flat(module.weight),
        _flat(module.bias),
        own,
        momentum,
        module.eps,
    )
    return Computed(Value.folded(out, x.members), "folded", "K*C channels, each with its own statistics")


def _flat(t: Tensor | None) -> Tensor | None:
    """`K C -> (KC)`, a view: running statistics are updated through it."""
    return None if t is None else t.view(-1)


def _group_norm(module: nn.GroupNorm, _: MemberRandomness, x: Value) -> Computed | str:
    groups = x.members * module.num_groups
    out = F.group_norm(x.as_folded(), groups, _flat(module.weight), _flat(module.bias), module.eps)
    return Computed(Value.folded(out, x.members), "folded", "K*G groups")


def _instance_norm(
    module: nn.modules.instancenorm._InstanceNorm, _: MemberRandomness, x: Value
) -> Computed | str:
    if module.track_running_stats or x.rank < 3:
        return "it tracks statistics, or the input has no batch axis"
    out = F.instance_norm(x.as_folded(), weight=_flat(module.weight), bias=_flat(module.bias), eps=module.eps)
    return Computed(Value.folded(out, x.members), "folded", "K*C channels")


def _layer_norm(module: nn.LayerNorm, _: MemberRandomness, x: Value) -> Computed | str:
    shape = module.normalized_shape
    if x.rank <= len(shape):
        return "the whole input is normalised"
    is_folded = x.layout is Layout.FOLDED
    out = F.layer_norm(x.as_split() if is_folded else x.as_stacked(), shape, eps=module.eps)
    # weights K..shape against NK..shape or K..shape
    between = (1,) * (x.rank - len(shape) - (1 if is_folded else 0))
    if module.weight is not None:
        out = out * module.weight.reshape(x.members, *between, *shape)
    if module.bias is not None:
        out = out + module.bias.reshape(x.members, *between, *shape)
    return Computed(Value.of_split(out) if is_folded else Value.stacked(out), "folded", "own scale and shift")


def draw_dropout(value: Value, p: float, randomness: MemberRandomness, *, channels: bool) -> Computed | str:
    """Drop elements, or whole `channels`, by every member's own stream: bitwise what it draws alone."""
    if value.tensor.device.type != "cpu":
        return "every member draws from its own CPU stream"
    if p == 1:
        return "everything is dropped"
    shape = value.shape if not channels else torch.Size((*value.shape[:2], *(1,) * (value.rank - 2)))
    masks = []
    for k in range(len(randomness)):
        with randomness.of(k):
            masks.append(torch.empty(shape, dtype=value.tensor.dtype).bernoulli_(1 - p).div_(1 - p))
    why = "a mask a member, by its own stream"
    if value.layout is Layout.FOLDED:
        return Computed(Value.of_split(value.as_split() * torch.stack(masks, 1)), "folded", why)
    return Computed(Value.stacked(value.as_padded(value.rank) * torch.stack(masks)), "folded", why)


def _dropout(module: nn.modules.dropout._DropoutNd, randomness: MemberRandomness, x: Value) -> Computed | str:
    if not module.training or module.p == 0 or not x.tensor.numel():
        return Computed(x, "folded", "nothing is dropped")
    channels = not isinstance(module, nn.Dropout)
    if channels and x.rank != _CHANNEL_DROPOUTS[type(module)]:
        return "the input has no batch axis"
    return draw_dropout(x, module.p, randomness, channels=channels)


_CHANNEL_DROPOUTS: dict[type, int] = {nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5}


def _elementwise(module: nn.Module, _: MemberRandomness, x: Value) -> Computed | str:
    return Computed(Value(module(x.tensor), x.layout, x.members), "folded", "element by element")


def _softmax(module: nn.Softmax | nn.LogSoftmax, _: MemberRandomness, x: Value) -> Computed | str:
    if (module.dim != -1 and module.dim != x.rank - 1) or x.rank < 2:
        return "not over the last axis"
    function = torch.log_softmax if isinstance(module, nn.LogSoftmax) else torch.softmax
    return Computed(Value.stacked(function(x.as_stacked(), -1)), "folded", "row by row")


def _channelwise(spatial: int) -> Rule:
    def rule(module: nn.Module, _: MemberRandomness, x: Value) -> Computed | str:
        if x.rank != spatial + 2:
            return "the input has no batch axis"
        if getattr(module, "return_indices", False):
            return "it returns indices too"
        if x.layout is Layout.SHARED:
            return Computed(Value.shared(module(x.tensor), x.members), "once", "shared data, no parameters")
        out = module(x.as_folded())
        return Computed(Value.folded(out, x.members), "folded", "channel by channel")

    return rule


def _flatten(module: nn.Flatten, _: MemberRandomness, x: Value) -> Computed | str:
    if module.start_dim != 1 or module.end_dim not in (-1, x.rank - 1) or x.rank < 2:
        return "not from the channels to the end"
    # N(KC).. -> N(KC..), K outer still
    if x.layout is Layout.STACKED:
        return Computed(Value.stacked(x.tensor.flatten(2)), "folded", "a view")
    return Computed(Value(x.tensor.flatten(1), x.layout, x.members), "folded", "a view")


_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip  # one a line is a page

_CHANNELWISE: dict[type[nn.Module], int] = {
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3,
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3,
    nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3,
    nn.LPPool2d: 2, nn.PixelShuffle: 2, nn.PixelUnshuffle: 2,
    nn.ReflectionPad1d: 1, nn.ReflectionPad2d: 2, nn.ReplicationPad1d: 1, nn.ReplicationPad2d: 2,
    nn.Upsample: 2, nn.UpsamplingBilinear2d: 2, nn.UpsamplingNearest2d: 2, nn.ZeroPad2d: 2,
}  # fmt: skip  # one a line is a page

MODULE_RULES: dict[type[nn.Module], Rule] = {
    nn.Conv1d: _conv, nn.Conv2d: _conv, nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv, nn.ConvTranspose2d: _conv, nn.ConvTranspose3d: _conv,
    nn.Linear: _linear, nn.Embedding: _embedding, nn.Flatten: _flatten,
    nn.BatchNorm1d: _batch_norm, nn.BatchNorm2d: _batch_norm, nn.BatchNorm3d: _batch_norm,
    nn.InstanceNorm1d: _instance_norm, nn.InstanceNorm2d: _instance_norm, nn.InstanceNorm3d: _instance_norm,
    nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm,
    nn.Dropout: _dropout, nn.Dropout1d: _dropout, nn.Dropout2d: _dropout, nn.Dropout3d: _dropout,
    nn.Softmax: _softmax, nn.LogSoftmax: _softmax,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **{kind: _channelwise(spatial) for kind, spatial in _CHANNELWISE.items()},
}  # fmt: skip  # one a line is a page
"""Rule of every module type that has one; by exact type, since a subclass may compute something else."""
