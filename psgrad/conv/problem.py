"""`WeightGradProblem`: one convolution's per-sample weight gradients, in the form strategies see.

Whatever a caller brings (transposed convolutions, padding="same", several rows per sample) is
normalised here, at the door, so that a strategy knows plain convolutions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from psgrad.conv.geometry import ConvGeometry, meets_padding_alone
from psgrad.conv.hashed_once import HashedOnce
from psgrad.conv.scratch import is_traced
from psgrad.errors import ShapeError, StrategyError

__all__ = ["WeightGradProblem", "normalise", "problem_of"]


@dataclass(frozen=True)
class WeightGradProblem(HashedOnce):
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

    __hash__ = HashedOnce.__hash__

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
            for d, dead in enumerate(
                meets_padding_alone(
                    size, out, g.kernel_size[axis], g.stride[axis], g.padding[axis][0], g.dilation[axis]
                )
            )
            if dead
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one sample's weight gradient."""
        return self.weight_numel * self.dtype.itemsize

    @property
    def operand_bytes(self) -> int:
        """Bytes of one sample's rows of x and grad."""
        channels = self.in_per_group * prod(self.input_size) + self.out_per_group * self.positions
        return self.rows_per_sample * self.groups * channels * self.dtype.itemsize

    def with_samples(self, samples: int) -> WeightGradProblem:
        """Return the same problem for another number of samples."""
        return replace(self, samples=samples)


def normalise(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    rows_per_sample: int = 1,
) -> tuple[Tensor, Tensor, WeightGradProblem]:
    """Check the shapes and return x, grad and the problem of an equal plain convolution.

    A transposed convolution's weight gradient is that of the convolution in which x and grad_output
    change places, with the same weight shape. Asymmetric padding is added to x. Shapes seen before cost
    one look-up. A tensor that is negative by a bit (`z.conj().imag`) is written out.

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
    StrategyError
        For complex numbers, integers and floating point of a byte.

    """
    form = _form_of(x, grad_output, weight_shape, geometry, rows_per_sample)
    x, grad_output = x.resolve_neg(), grad_output.resolve_neg()  # kernels read memory, not what a bit says
    if is_traced():  # strides and offsets that strategies read become numbers of the graph: those of a copy
        x, grad_output = (t.clone(memory_format=torch.contiguous_format) for t in (x, grad_output))
    if geometry.transposed:
        x, grad_output = grad_output, x
    for ends in (form.pad, form.cut):  # the cut may be longer than x itself: it comes second
        x = F.pad(x, ends) if ends is not None else x
    return x, grad_output, form.problem


def problem_of(
    x: Tensor,
    grad_output: Tensor,
    weight_shape: Sequence[int],
    geometry: ConvGeometry,
    rows_per_sample: int = 1,
) -> WeightGradProblem:
    """Return what `normalise` would, the problem alone: shapes are read, nothing is copied."""
    return _form_of(x, grad_output, weight_shape, geometry, rows_per_sample).problem


def _form_of(
    x: Tensor, grad_output: Tensor, weight_shape: Sequence[int], geometry: ConvGeometry, rows_per_sample: int
) -> _NormalForm:
    if isinstance(weight_shape, Tensor):
        raise ShapeError(f"weight_shape is a tensor {tuple(weight_shape.shape)}: give weight.shape")
    if isinstance(rows_per_sample, float):  # which the cache would take for the int
        raise ShapeError(f"rows_per_sample must be an int, got {rows_per_sample}")
    return _normal_form(
        tuple(x.shape),
        tuple(grad_output.shape),
        tuple(weight_shape),
        geometry,
        rows_per_sample,
        (x.dtype, x.device),
        (grad_output.dtype, grad_output.device),
    )


@dataclass(frozen=True)
class _NormalForm:
    """How tensors become those of an equal plain convolution, and its problem.

    Attributes
    ----------
    pad, cut
        What x, after a transposed convolution's swap, is padded by and then cut by, in the order of
        `torch.nn.functional.pad`; None for nothing.

    """

    pad: tuple[int, ...] | None
    cut: tuple[int, ...] | None
    problem: WeightGradProblem


@lru_cache(maxsize=4096)
def _normal_form(
    x_shape: tuple[int, ...],
    grad_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: ConvGeometry,
    rows_per_sample: int,
    x_kind: tuple[torch.dtype, torch.device],
    grad_kind: tuple[torch.dtype, torch.device],
) -> _NormalForm:
    rank = len(weight_shape) - 2
    shapes = f"x {x_shape}, grad_output {grad_shape}, weight {weight_shape}"
    if rank not in (1, 2, 3) or len(x_shape) != rank + 2 or len(grad_shape) != rank + 2:
        raise ShapeError(f"need a batch axis, a channel axis and the same 1 to 3 spatial axes: {shapes}")
    if x_kind != grad_kind:
        kinds = "x is {} on {}, grad_output {} on {}".format(*x_kind, *grad_kind)
        raise ShapeError(f"{kinds}; cast one")
    if not x_kind[0].is_floating_point or x_kind[0].itemsize == 1:
        raise StrategyError(
            f"no strategy computes in {x_kind[0]}: weight gradients are of floating point, two bytes at least"
        )
    rows = x_shape[0]
    if rows_per_sample < 1 or rows % rows_per_sample:
        raise ShapeError(f"{rows} rows are not a multiple of rows_per_sample={rows_per_sample}")
    geometry = geometry.at(weight_shape[2:])
    groups = geometry.groups
    first, second = weight_shape[0], weight_shape[1] * groups
    in_channels, out_channels = (first, second) if geometry.transposed else (second, first)
    expected = (rows, out_channels, *geometry.output_size(x_shape[2:]))
    if grad_shape != expected or x_shape[1] != in_channels or first % groups:
        raise ShapeError(
            f"these do not belong to one convolution with groups={groups}: {shapes}; "
            f"expected x with {in_channels} channels and output {list(expected)}"
        )
    assert geometry.kernel_size is not None
    ends = geometry.padding
    if geometry.transposed:
        x_shape, grad_shape = grad_shape, x_shape
        plain = ConvGeometry(geometry.kernel_size, geometry.stride, ends, geometry.dilation)
        # An output_padding of a stride or more lets this convolution reach too far: pad less after.
        too_many = [
            size - reached
            for size, reached in zip(plain.output_size(x_shape[2:]), grad_shape[2:], strict=True)
        ]
        ends = tuple(
            (before, after - n * stride)
            for (before, after), n, stride in zip(ends, too_many, geometry.stride, strict=True)
        )
    both = tuple(max(0, min(pair)) for pair in ends)
    extra = [(before - least, after - least) for (before, after), least in zip(ends, both, strict=True)]
    problem = WeightGradProblem(
        samples=rows // rows_per_sample,
        rows_per_sample=rows_per_sample,
        out_per_group=weight_shape[0] // groups,
        in_per_group=weight_shape[1],
        input_size=tuple(size + sum(pair) for size, pair in zip(x_shape[2:], extra, strict=True)),
        output_size=grad_shape[2:],
        geometry=ConvGeometry(geometry.kernel_size, geometry.stride, both, geometry.dilation, groups=groups),
        dtype=x_kind[0],
        device=x_kind[1],
    )
    flat = [end for pair in reversed(extra) for end in pair]
    pad, cut = tuple(max(0, end) for end in flat), tuple(min(0, end) for end in flat)
    return _NormalForm(pad if any(pad) else None, cut if any(cut) else None, problem)
