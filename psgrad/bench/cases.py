"""The convolutions that are measured, in literal named sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psgrad.conv import ConvGeometry

__all__ = ["CASE_SETS", "ConvCase"]


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
        One int for every axis.
    groups
        Number of groups.
    channels_last
        Whether x and the output's gradient lie in memory channels last.

    """

    name: str
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    channels_last: bool = False

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.input_size)

    @property
    def geometry(self) -> ConvGeometry:
        """Of full rank."""
        return ConvGeometry(
            (self.kernel_size,) * self.rank, self.stride, self.padding, self.dilation, groups=self.groups
        ).at((self.kernel_size,) * self.rank)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(GO) I k."""
        return (self.out_channels, self.in_channels // self.groups, *(self.kernel_size,) * self.rank)

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
        return x, normal(self.out_channels, self.geometry.output_size(self.input_size))


CASE_SETS: dict[str, tuple[ConvCase, ...]] = {
    "resnet18-cifar": (
        ConvCase("stem 3-64 3x3 @32", 3, 64, (32, 32), 3, padding=1),
        ConvCase("layer1 64-64 3x3 @32", 64, 64, (32, 32), 3, padding=1),
        ConvCase("layer2 64-128 3x3/2 @32", 64, 128, (32, 32), 3, stride=2, padding=1),
        ConvCase("layer2 64-128 1x1/2 @32", 64, 128, (32, 32), 1, stride=2),
        ConvCase("layer2 128-128 3x3 @16", 128, 128, (16, 16), 3, padding=1),
        ConvCase("layer3 128-256 3x3/2 @16", 128, 256, (16, 16), 3, stride=2, padding=1),
        ConvCase("layer3 128-256 1x1/2 @16", 128, 256, (16, 16), 1, stride=2),
        ConvCase("layer3 256-256 3x3 @8", 256, 256, (8, 8), 3, padding=1),
        ConvCase("layer4 256-512 3x3/2 @8", 256, 512, (8, 8), 3, stride=2, padding=1),
        ConvCase("layer4 256-512 1x1/2 @8", 256, 512, (8, 8), 1, stride=2),
        ConvCase("layer4 512-512 3x3 @4", 512, 512, (4, 4), 3, padding=1),
    ),
    "depthwise": (
        ConvCase("depthwise 64 3x3 @32", 64, 64, (32, 32), 3, padding=1, groups=64),
        ConvCase("depthwise 128 3x3/2 @32", 128, 128, (32, 32), 3, stride=2, padding=1, groups=128),
        ConvCase("depthwise 96 7x7 @16", 96, 96, (16, 16), 7, padding=3, groups=96),
    ),
    "conv1d": (
        ConvCase("audio 1-32 80/16 @8000", 1, 32, (8000,), 80, stride=16),
        ConvCase("text 64-128 5 @256", 64, 128, (256,), 5, padding=2),
        ConvCase("dilated 64-64 3d4 @512", 64, 64, (512,), 3, padding=4, dilation=4),
    ),
    "pointwise-and-groups": (
        ConvCase("pointwise 256-64 1x1 @56", 256, 64, (56, 56), 1),
        ConvCase("patches 3-96 4x4/4 @32", 3, 96, (32, 32), 4, stride=4),
        ConvCase("resnext 128 3x3 32 groups @28", 128, 128, (28, 28), 3, padding=1, groups=32),
        ConvCase("256-256 3x3 @14", 256, 256, (14, 14), 3, padding=1),
    ),
    "tiny": (
        ConvCase("tiny 2-3 3x3 @5", 2, 3, (5, 5), 3, padding=1),
        ConvCase("tiny 2-2 3 @7", 2, 2, (7,), 3, groups=2),
    ),
}
"""Sets by name. "tiny" is for trying the benchmark itself."""
