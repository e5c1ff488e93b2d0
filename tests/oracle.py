"""The oracle: per-sample weight gradients in float64, one sample at a time, by autograd.

It takes a convolution's arguments as `torch.nn.functional` takes them and knows nothing of psgrad.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolve", "weight_grads"]

Ints = int | Sequence[int]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolve(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Ints = 1,
    padding: str | Ints | Sequence[tuple[int, int]] = 0,
    dilation: Ints = 1,
    transposed: bool = False,
    output_padding: Ints = 0,
    groups: int = 1,
) -> Tensor:
    """The convolution itself. A padding of (before, after) pairs, which torch does not take, is done here:
    zeros around the input, or for a transposed convolution elements cut from the output."""
    rank = weight.ndim - 2
    pairs = not isinstance(padding, str | int) and any(not isinstance(p, int) for p in padding)
    ends = [tuple(p) for p in padding] if pairs else []
    if pairs:
        ends = ends * rank if len(ends) == 1 else ends
        padding = 0
    if transposed:
        out = CONV_TRANSPOSE[rank](
            x,
            weight,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            dilation=dilation,
        )
        for axis, (before, after) in enumerate(ends, start=2):
            out = out.narrow(axis, before, out.shape[axis] - before - after)
        return out
    x = F.pad(x, [end for pair in reversed(ends) for end in pair])
    return CONV[rank](x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)


def weight_grads(
    x: Tensor, grad_output: Tensor, weight_shape: Sequence[int], *, rows_per_sample: int = 1, **conv
) -> Tensor:
    """Per-sample gradients `[N, *weight_shape]` in float64, of rows n K to (n + 1) K for each n.

    `conv` are the arguments of `convolve`.
    """
    x = x.detach().to(torch.float64).contiguous()
    grad_output = grad_output.detach().to(torch.float64).contiguous()
    samples = x.shape[0] // rows_per_sample
    grads = x.new_empty(samples, *weight_shape)
    for n in range(samples):
        rows = slice(n * rows_per_sample, (n + 1) * rows_per_sample)
        weight = x.new_zeros(tuple(weight_shape), requires_grad=True)
        out = convolve(x[rows], weight, **conv)
        (grads[n],) = torch.autograd.grad(out, weight, grad_output[rows])
    return grads
