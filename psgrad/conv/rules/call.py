"""`Call`: the numbers of one convolution as the operators take them, and the three operator calls.

Everything here works on tensors that are already folded; nothing knows of `B`, but for the helpers
that stand in for a `B` of length zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from psgrad.conv.geometry import ConvGeometry, meets_padding_alone

__all__ = ["Batched", "Call", "batch_length", "call_of", "is_recorded", "with_one_entry", "without_entries"]

_convolution_backward = torch.ops.aten.convolution_backward.default

Batched = tuple[Tensor, int | None]
"""A tensor and the position of its `B`."""


class Call(NamedTuple):
    """Arguments of `aten::convolution`, and the padding that the operator cannot do.

    Attributes
    ----------
    stride, padding, dilation, transposed, output_padding, groups
        As the operator has them: padding is the same on both sides.
    margins
        What is missing from `padding`, in the order of `torch.nn.functional.pad` (last axis first),
        or None if nothing is. A convolution's input is padded by it, a transposed convolution's
        output cropped by it.

    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int
    margins: tuple[int, ...] | None = None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Run `aten::convolution` with this many groups."""
        return torch.convolution(x, weight, bias, *self[:5], groups)

    def input_grad(self, grad_output: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Run `aten::convolution_backward` for the input gradient; only the shape of `x` is used."""
        return _convolution_backward(grad_output, x, weight, None, *self[:5], groups, (True, False, False))[0]

    def weight_grad(self, grad_output: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Run `aten::convolution_backward` for the weight gradient; only the shape of `weight` is used."""
        x = _plainly_strided(x)
        grad = _convolution_backward(grad_output, x, weight, None, *self[:5], groups, (False, True, False))[1]
        return self._without_leftovers(grad, grad_output, x) if _leaves_some(x) else grad

    def both_grads(
        self, grad_output: Tensor, x: Tensor, weight: Tensor, groups: int
    ) -> tuple[Tensor, Tensor]:
        """Run `aten::convolution_backward` for the gradients of input and weight."""
        x = _plainly_strided(x)
        both = _convolution_backward(grad_output, x, weight, None, *self[:5], groups, (True, True, False))[:2]
        return (both[0], self._without_leftovers(both[1], grad_output, x)) if _leaves_some(x) else both

    def _without_leftovers(self, grad: Tensor, grad_output: Tensor, x: Tensor) -> Tensor:
        """Put zeros where an offset meets padding alone: oneDNN's bfloat16 kernels write nothing there."""
        rank = len(self.stride)
        met, by = (grad_output, x) if self.transposed else (x, grad_output)
        for axis in range(rank):
            sizes = met.shape[axis - rank], by.shape[axis - rank], grad.shape[axis - rank]
            step = self.stride[axis], self.padding[axis], self.dilation[axis]
            dead = _dead(sizes, step, grad.device)
            if dead is not None:
                grad = grad.masked_fill(dead.view(-1, *(1,) * (rank - 1 - axis)), 0)
        return grad

    def padded(self, t: Tensor, bdim: int | None) -> Batched:
        """Pad the spatial axes by the margins; `B` comes first."""
        assert self.margins is not None
        if bdim is not None:
            t, bdim = t.movedim(bdim, 0), 0
        return F.pad(t, self.margins), bdim

    def padded_dummy(self, dummy: Tensor) -> Tensor:
        """Return a one-element dummy of the shape that `padded` would give."""
        assert self.margins is not None
        rank = len(self.margins) // 2
        sizes = [
            length + self.margins[2 * (rank - 1 - axis)] + self.margins[2 * (rank - 1 - axis) + 1]
            for axis, length in enumerate(dummy.shape[-rank:])
        ]
        return dummy.new_empty(()).expand(*dummy.shape[:-rank], *sizes)

    def cropped(self, t: Tensor) -> Tensor:
        """Undo `padded`: take the margins off the last axes."""
        assert self.margins is not None
        return F.pad(t, [-margin for margin in self.margins])


def _leaves_some(x: Tensor) -> bool:
    """Whether the backend is oneDNN in half precision."""
    return x.dtype.itemsize < 4 and x.device.type == "cpu"


def _dead(sizes: tuple[int, ...], step: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Which offsets along an axis meet padding alone, `[k]`; None if none does."""
    if not any(isinstance(size, torch.SymInt) for size in sizes):
        dead = meets_padding_alone(*sizes, *step)
        return torch.tensor(dead, device=device) if any(dead) else None
    (size, positions, kernel), (stride, padding, dilation) = sizes, step
    t, d = torch.arange(positions, device=device), torch.arange(kernel, device=device)
    where = stride * t[:, None] + dilation * d - padding
    return ((where < 0) | (where >= size)).all(0)


def _plainly_strided(x: Tensor) -> Tensor:
    """Give a contiguous tensor the strides of the plain format.

    A fold may leave a stride on an axis of one element that reads as channels_last, and the CPU's native
    backend then fails.
    """
    return x.view(-1).view(x.shape) if 1 in x.shape and x.is_contiguous() else x


@lru_cache(maxsize=1024)
def call_of(geometry: ConvGeometry, kernel_size: tuple[int, ...]) -> Call:
    """Return the call of a geometry for this kernel.

    Raises
    ------
    ShapeError
        If the geometry was given another kernel or another number of spatial axes.

    """
    geometry = geometry.at(kernel_size)
    margins = None
    if not geometry.is_padding_symmetric:
        least = geometry.symmetric_padding
        pairs = reversed(list(zip(geometry.padding, least, strict=True)))
        margins = tuple(end for (before, after), p in pairs for end in (before - p, after - p))
    return Call(
        geometry.stride,
        geometry.symmetric_padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
        margins,
    )


def batch_length(*operands: tuple[Tensor | None, int | None]) -> int | None:
    """Length of `B` in the first operand that has it; None if none has."""
    for t, bdim in operands:
        if t is not None and bdim is not None:
            return t.shape[bdim]
    return None


def with_one_entry(t: Tensor, bdim: int | None) -> Tensor:
    """Give a `B` of length zero one entry of zeros.

    Nothing can be folded into the channels zero times, so for B = 0 a rule is run with one entry and
    `without_entries` drops it again: shapes and autograd graph are then those of every other B.
    """
    if bdim is None:
        return t
    entry = list(t.shape)
    entry[bdim] = 1
    return torch.cat([t, t.new_zeros(entry)], bdim)


def without_entries(t: Tensor, bdim: int | None) -> Batched:
    """Drop every entry of `B`; a result without `B` stays as it is."""
    return (t if bdim is None else t.narrow(bdim, 0, 0)), bdim


def is_recorded(*operands: Tensor) -> bool:
    """Whether an outer transform, autograd or forward-mode AD follows an operation on these tensors.

    If not, a rule may write into a tensor that it made itself.
    """
    return (
        forward_ad._current_level >= 0
        or any(is_functorch_wrapped_tensor(t) for t in operands)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
    )
