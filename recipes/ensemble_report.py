"""What an ensemble's probabilities are worth: scores, and the reliability diagram."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

__all__ = ["plot_reliability", "reliability", "scores"]

BINS = 15


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood (nats), expected calibration error and Brier score.

    Parameters
    ----------
    probabilities
        `[N, classes]`.
    labels
        `[N]`, int64.

    """
    classes = probabilities.shape[1]
    right = torch.nn.functional.one_hot(labels, classes)
    of_right = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(probabilities.dtype).tiny)
    ece = multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=BINS, norm="l1")
    return {
        "accuracy": float((probabilities.argmax(1) == labels).float().mean()),
        "nll": float(-of_right.log().mean()),
        "ece": float(ece),
        "brier": float((probabilities - right).square().sum(1).mean()),
    }


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[list[float], list[float], list[int]]:
    """Mean confidence, accuracy and count of each bin of confidence that is not empty."""
    confidence, chosen = probabilities.max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    rows = [(confidence[bins == b], (chosen == labels)[bins == b].float()) for b in range(BINS)]
    full = [(float(c.mean()), float(hit.mean()), len(c)) for c, hit in rows if len(c)]
    return [c for c, _, _ in full], [a for _, a, _ in full], [n for _, _, n in full]


def plot_reliability(members: Tensor, labels: Tensor, path: Path, title: str) -> None:
    """Draw accuracy over confidence, of the mean prediction and of every member `[K, N, classes]`."""
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", lw=1)
    for k, own in enumerate(members):
        confidence, accuracy, _ = reliability(own, labels)
        axes.plot(confidence, accuracy, color="tab:blue", alpha=0.25, label=None if k else "members")
    confidence, accuracy, _ = reliability(members.mean(0), labels)
    axes.plot(confidence, accuracy, color="tab:red", marker="o", label="mean of the members")
    axes.set_xlabel("confidence")
    axes.set_ylabel("test accuracy")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
