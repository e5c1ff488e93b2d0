"""Models whose per-sample gradients an ensemble gives, and what they are checked against."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import psgrad
from psgrad.ensemble import Ensemble
from tests.ensemble.models import Branches, Branching, Silent, Tied, View, images, rows, tokens
from tests.model_oracle import grads_one_by_one

K = 3


class Twice(nn.Module):
    """A layer that is called twice, on values that lie differently, and one of which a part is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3).eval()
        self.norm.running_mean.normal_()
        self.head = nn.Linear(3, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(torch.relu(self.mix(x)))).mean([2, 3]))


class Attention(nn.Module):
    """A position embedding and an attention: parameters that no layer with a rule owns."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.position
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Turned(nn.Module):
    """A layer whose rows are positions, not samples; five positions look like a batch of five."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.word(tokens).transpose(0, 1)).mean(0)


FOLDED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
            nn.Conv2d(4, 4, 2, groups=4, padding="same"),
            nn.LayerNorm([4, 3, 3]),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        images,
    ),
    "on shared data with groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(96, 3)),
        images,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
            nn.InstanceNorm2d(4, affine=True),
            nn.ConvTranspose2d(4, 4, 2, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        images,
    ),
    "padding": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(72, 3)
        ),
        images,
    ),
    "wide": (lambda: nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)), rows),
    "tied and frozen": (Tied, tokens),
    "called twice": (Twice, images),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)),
        rows,
    ),
    "one layer": (lambda: nn.Linear(4, 3), rows),
}
LOOPED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "a parameter of its own": (Branches, images),
    "attention": (Attention, tokens),
    "rows that are positions": (Turned, tokens),
    "two positions": (Turned, lambda n: tokens(n)[:, :2]),
    "control flow": (Branching, rows),
    "no_grad block": (Silent, rows),
    "changed through a view": (View, rows),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Dropout(0.5)),
        rows,
    ),
}
CASES = {**FOLDED, **LOOPED}
NOT_ONE_BY_ONE = ("dropout", "parametrized", "control flow")
"""Where a sample alone draws another mask, or takes another branch, than in its batch."""


def criterion(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, y: F.cross_entropy(out, y, reduction=reduction)


def data(make: Callable[[int], Tensor], members: int, n: int, own: bool) -> tuple[Tensor, Tensor]:
    x = torch.stack([make(n) for _ in range(members)]) if own else make(n)
    return x, torch.randint(0, 3, (members, n) if own else (n,))


def one_at_a_time(
    ens: Ensemble, k: int, x: Tensor, y: Tensor, max_norm: float, reduction: str
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Member k's flat clipped gradient by path, and its samples' norms: an ordinary backward a sample."""

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    grads = grads_one_by_one(ens.member(k), loss_of, [x, y])
    used = {path: grad for path, grad in grads.items() if grad is not None}
    norms = sum(grad.flatten(1).square().sum(1) for grad in used.values()).sqrt()
    factors = (max_norm / norms).clamp(max=1.0) / (len(x) if reduction == "mean" else 1)
    return {path: torch.einsum("n,n...->...", factors, grad) for path, grad in used.items()}, norms


def clipped(
    ens: Ensemble, x: Tensor, y: Tensor, own: bool, max_norm: float, reduction: str = "mean", **settings
) -> psgrad.clipping.ClipResult:
    with psgrad.clip_per_sample(ens, max_norm, reduction, **settings) as handle:
        ens.loss(criterion(reduction), x, y, own=own).sum().backward()
        return handle.result


def median_norm(ens: Ensemble, x: Tensor, y: Tensor, own: bool) -> float:
    """A bound that some samples are above and some below."""
    norms = clipped(copy.deepcopy(ens), x, y, own, 1.0).norms
    return float(norms.median()) if norms.numel() else 1.0
