"""`WeightGradProblem`: one convolution's per-sample weight gradients, in the form strategies see.

Whatever a caller brings (transposed convolutions, padding="same", several rows per sample) is
normalised here, at the door, so that a strategy knows plain convolutions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.errors import ShapeError

__all__ = ["WeightGradProblem", "normalise"]


@dataclass(frozen=True)
class WeightGradProblem:
    """The shapes of `dW[n, (g o), i, d] = sum_kt grad[(n k), (g o), t] * x[(n k), (g i), s t + dil d - p]`.

    Attributes
    ----------
    samples
        N, the number of per-sample gradients.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample.
    out_per_group, in_per_group
        O and I.
    input_size, output_size
        Spatial sizes of x and of grad.
    geometry
        Of full rank, with its kernel, not transposed, padded symmetrically.
    dtype, device
        Of x and of grad, which agree.

    """

    samples: int
    rows_per_sample: int
    out_per_group: int
    in_per_group: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    geometry: ConvGeometry
    dtype: torch.dtype
    device: torch.device

    @property
    def groups(self) -> int:
        """G."""
        return self.geometry.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(GO) I k."""
        assert self.geometry.kernel_size is not None
        return (self.groups * self.out_per_group, self.in_per_group, *self.geometry.kernel_size)

    @property
    def positions(self) -> int:
        """T, the output positions of one row."""
        return prod(self.output_size)

    @property
    def weight_numel(self) -> int:
        """P, the number of weights."""
        return prod(self.weight_shape)

    @property
    def flops(self) -> int:
        """F = 2 N K T P: what the ordinary weight gradient of the batch costs, in FLOPs."""
        return 2 * self.samples * self.rows_per_sample * self.positions * self.weight_numel

    @cached_property
    def padding_only_offsets(self) -> tuple[tuple[int, int], ...]:
        """Every (axis of the weight, kernel offset) that meets `geometry`'s padding alone: gradient 0.

        On small inputs these exist: a kernel of 3 with padding 1 on one position has two an axis.
        """
        g = self.geometry
        assert g.kernel_size is not None
        return tuple(
            (axis + 2, d)
            for axis, (size, out) in enumerate(zip(self.input_size, self.output_size, strict=True))
            for d in range(g.kernel_size[axis])
            if not any(
                0 <= g.stride[axis] * t + g.dilation[axis] * d - g.padding[axis][0] < size for t in range(out)
            )
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one sample's weight gradient."""
        return self.weight_numel * self.dtype.itemsize


def normalise(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    rows_per_sample: int = 1,
) -> tuple[Tensor, Tensor, WeightGradProblem]:
    """Check the shapes and return x, grad and the problem of an equal plain convolution.

    A transposed convolution's weight gradient is that of the convolution in which x and grad_output
    change places, with the same weight shape. Asymmetric padding is added to x.

    Parameters
    ----------
    x
        `[(N K), (G I), *spatial]`, any memory layout.
    grad_output
        `[(N K), (G O), *spatial]`, of the dtype and device of x.
    weight_shape
        `(GO) I k`, for a transposed convolution `(GI) O k`.
    geometry
        Of the convolution.
    rows_per_sample
        K.

    Raises
    ------
    ShapeError
        If anything does not fit; the message has the shapes.

    """
    weight_shape = tuple(weight_shape)
    rank = len(weight_shape) - 2
    shapes = f"x {tuple(x.shape)}, grad_output {tuple(grad_output.shape)}, weight {weight_shape}"
    if rank not in (1, 2, 3) or x.ndim != rank + 2 or grad_output.ndim != rank + 2:
        raise ShapeError(f"need a batch axis, a channel axis and the same 1 to 3 spatial axes: {shapes}")
    if x.dtype != grad_output.dtype or x.device != grad_output.device:
        raise ShapeError(
            f"x is {x.dtype} on {x.device}, grad_output {grad_output.dtype} on {grad_output.device}; cast one"
        )
    rows = x.shape[0]
    if rows_per_sample < 1 or rows % rows_per_sample:
        raise ShapeError(f"{rows} rows are not a multiple of rows_per_sample={rows_per_sample}")
    geometry = geometry.at(weight_shape[2:])
    output_size = geometry.output_size(x.shape[2:])
    if geometry.transposed:
        in_channels, out_channels = weight_shape[0], weight_shape[1] * geometry.groups
    else:
        in_channels, out_channels = weight_shape[1] * geometry.groups, weight_shape[0]
    if (
        grad_output.shape[0] != rows
        or x.shape[1] != in_channels
        or grad_output.shape[1] != out_channels
        or tuple(grad_output.shape[2:]) != output_size
        or weight_shape[0] % geometry.groups
    ):
        raise ShapeError(
            f"these do not belong to one convolution with groups={geometry.groups}: {shapes}; "
            f"expected output [{rows}, {out_channels}, {', '.join(map(str, output_size))}]"
        )

    assert geometry.kernel_size is not None
    if geometry.transposed:
        x, grad_output = grad_output, x
        geometry = ConvGeometry(
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            groups=geometry.groups,
        )
        # An output_padding of a stride or more lets this convolution reach too far: pad less after.
        ends = [
            (before, after - (size - reached) * stride)
            for (before, after), stride, size, reached in zip(
                geometry.padding,
                geometry.stride,
                geometry.output_size(x.shape[2:]),
                grad_output.shape[2:],
                strict=True,
            )
        ]
    else:
        ends = list(geometry.padding)
    x, geometry = _pad_to_symmetry(x, geometry, ends)
    problem = WeightGradProblem(
        samples=rows // rows_per_sample,
        rows_per_sample=rows_per_sample,
        out_per_group=weight_shape[0] // geometry.groups,
        in_per_group=weight_shape[1],
        input_size=tuple(x.shape[2:]),
        output_size=tuple(grad_output.shape[2:]),
        geometry=geometry,
        dtype=x.dtype,
        device=x.device,
    )
    return x, grad_output, problem


def _pad_to_symmetry(
    x: Tensor, geometry: ConvGeometry, ends: Sequence[tuple[int, int]]
) -> tuple[Tensor, ConvGeometry]:
    """Pad x where one side wants more than the other, so that the rest is the same on both.

    `ends` replaces the padding of `geometry`; a negative end cuts elements off.
    """
    both = tuple(max(0, min(pair)) for pair in ends)
    extra = [
        end
        for (before, after), least in reversed(list(zip(ends, both, strict=True)))
        for end in (before - least, after - least)
    ]
    # The cut may be longer than x itself: it comes second.
    for part in ([max(0, end) for end in extra], [min(0, end) for end in extra]):
        x = F.pad(x, part) if any(part) else x
    return x, ConvGeometry(
        geometry.kernel_size, geometry.stride, both, geometry.dilation, groups=geometry.groups
    )
