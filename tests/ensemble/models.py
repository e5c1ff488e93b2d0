"""Members of many kinds, small: each exercises rules that the others do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """In-place addition and activation, as torchvision's blocks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.norm(self.first(x)))
        out = self.second(identity)
        out += identity
        return self.head(self.relu(out).mean([2, 3]))


class Branches(nn.Module):
    """Concatenation, excitation, functional pooling, view."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.scale = nn.Conv2d(8, 8, 1)
        self.weight = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Linear(8 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([self.left(x), F.relu(self.right(x))], dim=1)
        out = self.weight * out * torch.sigmoid(self.scale(F.adaptive_avg_pool2d(out, 1)))
        out = F.max_pool2d(out, 2)
        return self.head(out.view(out.size(0), -1))


class Tied(nn.Module):
    """One parameter under two names, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.mix.weight.requires_grad_(False)
        self.decoder = nn.Linear(5, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.mix(self.norm(self.embedding(tokens))))).mean(1)


class Branching(nn.Module):
    """Control flow on values, no sample's: nothing traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out * 2 if self.linear.bias.sum() > 0 else out


class Silent(nn.Module):
    """A `torch.no_grad` block, which a graph does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


class Unseen(Silent):
    """Stops gradients only where it is not traced."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return self.second(out.detach() if isinstance(x, Tensor) else out)


class View(nn.Module):
    """An in-place change that another name sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        half = out[:, :2]
        half.mul_(3.0)
        return out[:, :3]


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def rows(n: int) -> Tensor:
    return torch.randn(n, 4)


def tokens(n: int) -> Tensor:
    return torch.randint(0, 7, (n, 5))


FOLDED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=1),
            nn.BatchNorm2d(4, momentum=None),
            nn.Hardswish(inplace=True),
            nn.Conv2d(4, 4, 2, padding="same", padding_mode="circular"),
            nn.Flatten(),
            nn.Linear(36, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 3, bias=False),
        ),
        images,
    ),
    "group norm": (
        lambda: nn.Sequential(
            nn.GroupNorm(1, 3),
            nn.Conv2d(3, 6, 3, groups=3),
            nn.GroupNorm(2, 6),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        images,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 4, 2, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        images,
    ),
    "even same padding": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 2, padding="same"),
            nn.Conv2d(4, 4, 2, padding="same"),
            nn.InstanceNorm2d(4, affine=True),
            nn.Flatten(),
            nn.Linear(144, 3),
        ),
        images,
    ),
    "depthwise and layer norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.LayerNorm([4, 4, 4]),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        images,
    ),
    "dropout": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.Dropout2d(0.4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64, 8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(8, 3),
        ),
        images,
    ),
    "dropout of shared data": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3)), rows),
    "residual": (Residual, images),
    "branches": (Branches, images),
    "tied and frozen": (Tied, tokens),
    "one layer": (lambda: nn.Linear(4, 3), rows),
}
"""Members whose every layer has a rule: factory and data."""

LOOPED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "control flow": (Branching, rows),
    "no_grad block": (Silent, rows),
    "gradients stopped unseen": (Unseen, rows),
    "changed through a view": (View, rows),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        rows,
    ),
}
"""Members that run one after the other."""
