"""Models of the recipes."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["small_cnn"]


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
