"""`ConvGeometry`: everything about a convolution but its tensors, normalised once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from operator import index
from typing import TypeVar

from torch import nn

from psgrad.conv.hashed_once import HashedOnce
from psgrad.errors import ShapeError

__all__ = ["ConvGeometry", "IntOrInts", "Padding", "meets_padding_alone"]

_T = TypeVar("_T")

IntOrInts = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True, init=False)
class ConvGeometry(HashedOnce):
    """Kernel size, stride, padding, dilation, direction and groups of one convolution.

    Every argument takes an int or one int per spatial axis. An int is kept as a tuple of one
    element, which stands for every axis until `at` is told how many there are (the convention of
    `aten::convolution`).

    Attributes
    ----------
    kernel_size
        One int per spatial axis, or None while it is not known.
    stride, dilation, output_padding
        One int per spatial axis.
    padding
        One (before, after) pair per spatial axis. "valid" and "same" are resolved here; "same"
        pads the odd element after, as `torch.nn.functional.conv2d` does, and needs `kernel_size`.
    transposed
        Whether this is a transposed convolution, whose weight is `(GI)O` instead of `(GO)I`.
    groups
        Number of groups G.

    Raises
    ------
    ShapeError
        If the tuples differ in length, or a number is out of its range.

    """

    kernel_size: tuple[int, ...] | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    __hash__ = HashedOnce.__hash__

    def __init__(
        self,
        kernel_size: IntOrInts | None = None,
        stride: IntOrInts = 1,
        padding: Padding = 0,
        dilation: IntOrInts = 1,
        transposed: bool = False,
        output_padding: IntOrInts = 0,
        groups: int = 1,
    ) -> None:
        kernel = None if kernel_size is None else _ints("kernel_size", kernel_size, least=1)
        dilations = _ints("dilation", dilation, least=1)
        fields = {
            "kernel_size": kernel,
            "stride": _ints("stride", stride, least=1),
            "padding": _padding(padding, kernel, dilations, transposed),
            "dilation": dilations,
            "transposed": bool(transposed),
            "output_padding": _ints("output_padding", output_padding, least=0),
            "groups": _ints("groups", (groups,), least=1)[0],
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if any(self.output_padding) and not transposed:
            raise ShapeError("output_padding is only for transposed convolutions")
        lengths = {
            name: len(value) for name, value in fields.items() if isinstance(value, tuple) and len(value) > 1
        }
        if len(set(lengths.values())) > 1:
            raise ShapeError(f"a convolution has one number of spatial axes, got {lengths}")

    @classmethod
    def from_module(cls, module: nn.Module) -> ConvGeometry:
        """Read the geometry of an `nn.Conv{1,2,3}d` or `nn.ConvTranspose{1,2,3}d`.

        With `padding_mode` other than "zeros" the module pads its input itself and then convolves
        without padding: the geometry returned is that of the convolution, with padding 0.

        Raises
        ------
        ShapeError
            If `module` is no convolution.

        """
        if not isinstance(module, nn.modules.conv._ConvNd):
            raise ShapeError(f"{type(module).__name__} is not a convolution")
        return _geometry(
            module.kernel_size,
            module.stride,
            module.padding if module.padding_mode == "zeros" else 0,
            module.dilation,
            module.transposed,
            module.output_padding,
            module.groups,
        )

    def at(self, kernel_size: Sequence[int]) -> ConvGeometry:
        """Return the same geometry with this kernel and one entry per spatial axis everywhere.

        Raises
        ------
        ShapeError
            If the geometry was given another kernel or another number of spatial axes.

        """
        kernel = tuple(kernel_size)
        rank = len(kernel)
        if self.kernel_size is not None and _broadcast("kernel_size", self.kernel_size, rank) != kernel:
            raise ShapeError(f"the geometry has kernel {self.kernel_size}, the weight has {kernel}")
        return replace(  # through __init__ again, which takes the pairs as they are
            self,
            kernel_size=kernel,
            stride=_broadcast("stride", self.stride, rank),
            padding=_broadcast("padding", self.padding, rank),
            dilation=_broadcast("dilation", self.dilation, rank),
            output_padding=_broadcast("output_padding", self.output_padding, rank),
        )

    @property
    def rank(self) -> int | None:
        """Number of spatial axes, or None while only single ints were given."""
        tuples = (self.kernel_size or (), self.stride, self.padding, self.dilation, self.output_padding)
        longest = max(len(t) for t in tuples)
        return longest if longest > 1 or self.kernel_size else None

    @cached_property
    def kernel_positions(self) -> int:
        """Number of kernel offsets k = prod(kernel_size)."""
        return prod(self._kernel)

    @property
    def _kernel(self) -> tuple[int, ...]:
        if self.kernel_size is None:
            raise ShapeError("this ConvGeometry has no kernel_size; give one or call at(weight.shape[2:])")
        return self.kernel_size

    @property
    def is_padding_symmetric(self) -> bool:
        """Whether each axis is padded by as much before as after."""
        return all(before == after for before, after in self.padding)

    @cached_property
    def symmetric_padding(self) -> tuple[int, ...]:
        """Padding per axis that every backend can do itself: the smaller of (before, after)."""
        return tuple(min(pair) for pair in self.padding)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size `input_size`.

        Raises
        ------
        ShapeError
            If the sizes do not have the geometry's rank, or the output would be empty.

        """
        geometry = self.at(self._kernel if len(self._kernel) > 1 else self._kernel * len(input_size))
        if len(input_size) != geometry.rank:
            raise ShapeError(
                f"input of spatial size {tuple(input_size)} for a geometry of rank {geometry.rank}"
            )
        size = tuple(
            _output_length(length, *numbers, transposed=self.transposed)
            for length, *numbers in zip(
                input_size,
                geometry._kernel,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                geometry.output_padding,
                strict=True,
            )
        )
        if min(size) < 1:
            raise ShapeError(
                f"input of spatial size {tuple(input_size)} is smaller than the kernel of {geometry}"
            )
        return size


def _output_length(
    length: int,
    kernel: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    output_padding: int,
    *,
    transposed: bool,
) -> int:
    reach = dilation * (kernel - 1) + 1
    if transposed:
        return (length - 1) * stride - sum(padding) + reach + output_padding
    return (length + sum(padding) - reach) // stride + 1


_geometry = lru_cache(maxsize=1024)(ConvGeometry)
"""A layer's geometry is read at every step: what was normalised once is looked up."""


def _ints(name: str, value: IntOrInts, *, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(map(index, value if isinstance(value, Iterable) else (value,)))
    except TypeError:
        raise ShapeError(f"{name} takes whole numbers, got {value!r}") from None
    if not numbers or min(numbers) < least:
        raise ShapeError(f"{name} must be at least {least} on every axis, got {value}")
    return numbers


def _padding(
    padding: Padding, kernel: tuple[int, ...] | None, dilation: tuple[int, ...], transposed: bool
) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),)
        if padding != "same":
            raise ShapeError(f'padding must be ints, "same" or "valid", got {padding!r}')
        if transposed:
            raise ShapeError('padding="same" is not defined for transposed convolutions')
        if kernel is None:
            raise ShapeError('padding="same" needs kernel_size')
        rank = max(len(kernel), len(dilation))
        totals = [
            d * (k - 1)
            for k, d in zip(_broadcast("", kernel, rank), _broadcast("", dilation, rank), strict=True)
        ]
        return tuple((total // 2, total - total // 2) for total in totals)
    ends = [
        _ints("padding", end, least=0) for end in (padding if isinstance(padding, Iterable) else (padding,))
    ]
    if not ends or max(map(len, ends)) > 2:
        raise ShapeError(f"padding is an int or a pair (before, after) for every axis, got {padding}")
    return tuple((end[0], end[-1]) for end in ends)


def _broadcast(name: str, value: tuple[_T, ...], rank: int) -> tuple[_T, ...]:
    if len(value) == 1:
        return value * rank
    if len(value) != rank:
        raise ShapeError(f"{name} has {len(value)} spatial axes, the tensors have {rank}")
    return value


@lru_cache(maxsize=4096)
def meets_padding_alone(
    size: int, positions: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[bool, ...]:
    """Of every kernel offset along an axis: whether no position of the kernel puts it on an element.

    `padding` is that before the axis.
    """
    return tuple(
        all(not 0 <= stride * t + dilation * d - padding < size for t in range(positions))
        for d in range(kernel)
    )
