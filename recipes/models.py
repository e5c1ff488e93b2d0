"""The model of the recipes, and how often it is right."""

from __future__ import annotations

import torch
from torch import nn

from recipes.data import Images

__all__ = ["accuracy", "small_cnn"]


def small_cnn(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """Build a CNN of two convolutions and two linear layers, bounded activations throughout.

    Tanh, because under clipping and noise unbounded activations grow and get clipped (Papernot et al.
    2021, "Tempered Sigmoid Activations for Deep Learning with Differential Privacy"). 26,010 parameters
    on 28 x 28 grey images: noise grows with their number.

    Parameters
    ----------
    channels, height, width
        Of an image, at least 20 by 20.
    classes
        Length of the output.

    """
    features = nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
    )
    with torch.no_grad():
        size = features(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(*features, nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, classes))


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Fraction of the test images that are classified right."""
    parts = zip(images.test_x.split(2000), images.test_y.split(2000), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(images.test_y)
