"""The models whose training step is measured, as people have them and as the peers need them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, convnext_tiny, resnet18, vgg11
from torchvision.models.resnet import BasicBlock

__all__ = ["MODELS", "StepModel", "without_in_place"]

CLASSES = 10


@dataclass(frozen=True)
class StepModel:
    """A model and the images it takes.

    Attributes
    ----------
    make
        Builds it, without dropout and stochastic depth: the same numbers at every call.
    image
        `(channels, height, width)`.

    """

    make: Callable[[], nn.Module]
    image: tuple[int, int, int] = (3, 32, 32)

    def seeded(self, seed: int = 0) -> nn.Module:
        """Build the model with the same parameters for the same seed, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().train()

    def batch(self, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return images `[N, *image]`, standard normal, and labels `[N]`."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch_size, *self.image, generator=generator)
        return x, torch.randint(CLASSES, (batch_size,), generator=generator)


def without_in_place(model: nn.Module) -> nn.Module:
    """Return a copy without in-place activations and residuals, which hooks on modules do not survive."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]  # a bool wherever it exists
        if type(module) is BasicBlock:
            module.__class__ = _OutOfPlaceBlock
    return model


class _OutOfPlaceBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet18_gn() -> nn.Module:
    """ResNet-18 of torchvision; 32 groups, as Opacus's `ModuleValidator.fix` has them. 11.2M parameters."""
    return resnet18(num_classes=CLASSES, norm_layer=lambda channels: nn.GroupNorm(32, channels))


def vgg11_32() -> nn.Module:
    """The convolutions of VGG-11 and one linear layer, as images of 32 x 32 ask for. 9.2M parameters."""
    model = vgg11(num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, CLASSES)
    return model


def convnext() -> nn.Module:
    """ConvNeXt-tiny of torchvision. 27.8M parameters."""
    return convnext_tiny(num_classes=CLASSES, stochastic_depth_prob=0.0)


def vit_tiny() -> nn.Module:
    """Vision transformer of DeiT's tiny size, patches of 8. 5.4M parameters."""
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=CLASSES,
    )


def tanh_cnn_28() -> nn.Sequential:
    """The CNN for MNIST of Papernot et al. 2021 and Tramer & Boneh 2021. 26 thousand parameters.

    It averages where theirs takes the maximum: of numbers as close as tanh leaves them, float32 and float64
    take different ones, and the gate could not tell that from an error.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.Tanh(),
        nn.Linear(32, CLASSES),
    )


def tanh_cnn_32() -> nn.Sequential:
    """The CNN for CIFAR-10 of the same papers, averaging likewise. 0.55M parameters."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    head = (nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.Tanh(), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers, *head)


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions (Zagoruyko & Komodakis 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(16, before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(16, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, before, H, W] -> [N, after, H / stride, W / stride]`."""
        out = self.norm1(x).relu()
        shortcut = self.shortcut(x if isinstance(self.shortcut, nn.Identity) else out)
        return shortcut + self.conv2(self.norm2(self.conv1(out)).relu())


def wrn_16_4_gn() -> nn.Sequential:
    """WRN-16-4 with GroupNorm, as in De et al. 2022. 2.7M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    for before, after, stride in ((16, 64, 1), (64, 128, 2), (128, 256, 2)):
        layers += [WideBlock(before, after, stride), WideBlock(after, after, 1)]
    head = (nn.GroupNorm(16, 256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, CLASSES))
    return nn.Sequential(*layers, *head)


class StandardisedConv2d(nn.Conv2d):
    """Convolution with a weight that is standardised, by output, in each forward (Qiao et al. 2019).

    And divided by the root of the fan-in (Brock et al. 2021), which keeps float32 as near to float64 as else.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W] -> [N, out_channels, H', W']`."""
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), unbiased=False, keepdim=True)
        return self._conv_forward(
            x, (self.weight - mean) * torch.rsqrt(variance * self.weight[0].numel() + 1e-5), self.bias
        )


def standardised(model: nn.Module) -> nn.Module:
    """Return the model with its convolutions' weights standardised."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = StandardisedConv2d
    return model


def tiny() -> nn.Sequential:
    """Small enough to try the benchmark itself, with an in-place activation. 0.4 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, CLASSES),
    )


MODELS: dict[str, StepModel] = {
    "resnet18-gn": StepModel(resnet18_gn),
    "wrn-16-4-gn": StepModel(wrn_16_4_gn),
    "resnet18-ws": StepModel(lambda: standardised(resnet18_gn())),
    "wrn-16-4-ws": StepModel(lambda: standardised(wrn_16_4_gn())),
    "vgg11": StepModel(vgg11_32),
    "tanh-cnn-28": StepModel(tanh_cnn_28, (1, 28, 28)),
    "tanh-cnn-32": StepModel(tanh_cnn_32),
    "convnext-tiny": StepModel(convnext),
    "vit-tiny": StepModel(vit_tiny),
    "tiny": StepModel(tiny, (1, 8, 8)),
}
"""By name; a new one is a function and a line here. "tiny" is for trying the benchmark itself."""
