"""The models that are fitted K at once, from a tabular network to ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

__all__ = ["MODELS", "built"]


def mlp() -> nn.Module:
    """Tabular: 20 features, two hidden layers of 64."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def lenet() -> nn.Module:
    """LeNet-5 with ReLU."""
    convolutions = (nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU())
    head = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *head)


def small_cnn_bn() -> nn.Module:
    """Three convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def resnet20() -> nn.Module:
    """ResNet-20 of the CIFAR experiments, with BatchNorm; shortcuts by 1x1 convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for planes, stride in ((16, 1), (32, 2), (64, 2)):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        layers += [
            BasicBlock(before, planes, stride, shortcut),
            BasicBlock(planes, planes),
            BasicBlock(planes, planes),
        ]
        before = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18_gn() -> nn.Module:
    """torchvision's, with GroupNorm."""
    return resnet18(num_classes=10, norm_layer=partial(nn.GroupNorm, 32))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (20,)),
    "lenet": (lenet, (1, 28, 28)),
    "small-cnn-bn": (small_cnn_bn, (3, 32, 32)),
    "resnet20": (resnet20, (3, 32, 32)),
    "resnet18-gn": (resnet18_gn, (3, 32, 32)),
}
"""What builds it, and the shape of one sample. Its instances can be sent to another process."""


def built(make: Callable[[], nn.Module], seeds: range, dtype: torch.dtype, device: str) -> list[nn.Module]:
    """Build a model from every seed; torch's own generator is left as it was."""
    models: list[nn.Module] = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(make().to(device, dtype))
    return models
