"""`ConvCase`: one convolution that is measured, and what its arithmetic and its tensors amount to."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from psgrad.conv import ConvGeometry

__all__ = ["ConvCase"]

Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class ConvCase:
    """One convolution without bias, and the input it gets.

    Attributes
    ----------
    name
        Unique in its set.
    in_channels, out_channels
        All groups together.
    input_size
        Spatial size of x, one int per axis.
    kernel_size, stride, padding, dilation
        One int for every axis, or one each.
    groups
        Number of groups.
    transposed
        Whether it is a transposed convolution, of output_padding 0.
    channels_last
        Whether x and the output's gradient lie in memory channels last.

    """

    name: str
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: Sizes
    stride: Sizes = 1
    padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1
    transposed: bool = False
    channels_last: bool = False

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.input_size)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size, one int per axis."""
        k = self.kernel_size
        return (k,) * self.rank if isinstance(k, int) else k

    @property
    def geometry(self) -> ConvGeometry:
        """Of full rank."""
        return ConvGeometry(
            self.kernel, self.stride, self.padding, self.dilation, self.transposed, groups=self.groups
        ).at(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(GO) I k, transposed (GI) O k."""
        channels = (self.in_channels, self.out_channels)
        first, second = channels if self.transposed else channels[::-1]
        return (first, second // self.groups, *self.kernel)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return self.geometry.output_size(self.input_size)

    @property
    def positions(self) -> int:
        """T: how often the kernel is applied to a sample (transposed: the positions of the input)."""
        return prod(self.input_size if self.transposed else self.output_size)

    def flops(self, batch_size: int) -> int:
        """2 N T P, of the ordinary weight gradient."""
        return 2 * batch_size * self.positions * prod(self.weight_shape)

    def result_bytes(self, batch_size: int, itemsize: int = 4) -> int:
        """Bytes of the per-sample gradients, N P items."""
        return itemsize * batch_size * prod(self.weight_shape)

    def operand_bytes(self, batch_size: int, itemsize: int = 4) -> int:
        """Bytes of x and the output's gradient together."""
        numbers = self.in_channels * prod(self.input_size) + self.out_channels * prod(self.output_size)
        return itemsize * batch_size * numbers

    def operands(
        self, batch_size: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return x `[N, C_in, *spatial]` and the gradient of the output `[N, C_out, *spatial]`.

        Standard normal, the same for the same seed on every device.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(channels: int, size: tuple[int, ...]) -> Tensor:
            t = torch.randn(batch_size, channels, *size, generator=generator).to(device, dtype)
            if self.channels_last:
                t = t.movedim(1, -1).contiguous().movedim(-1, 1)
            return t

        x = normal(self.in_channels, self.input_size)
        return x, normal(self.out_channels, self.output_size)
