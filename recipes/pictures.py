"""The pictures of the training recipes."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["plot_norms", "plot_privacy"]


def plot_privacy(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Draw test accuracy and epsilon over the steps.

    Parameters
    ----------
    history
        Lines with "step", "epsilon", "accuracy" and "accuracy_raw", fractions of 1.
    path
        PNG to write.
    title
        Above the picture.

    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [line["step"] for line in history]
    top.plot(steps, [100 * line["accuracy"] for line in history], marker="o", ms=3, label="averaged weights")
    top.plot(steps, [100 * line["accuracy_raw"] for line in history], alpha=0.5, label="last weights")
    top.set_ylabel("test accuracy, %")
    top.legend(loc="lower right")
    top.set_title(title)
    bottom.plot(steps, [line["epsilon"] for line in history], color="tab:red")
    bottom.set_ylabel("epsilon spent")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_norms(
    accuracies: dict[str, list[float]], norms: dict[str, Tensor], wrong: Tensor, path: Path, title: str
) -> None:
    """Draw test accuracy over the epochs, and the norms of samples with right and with wrong labels.

    Parameters
    ----------
    accuracies
        By way of training, after each epoch, fractions of 1.
    norms
        By way of training, `[N]` gradient norms after it.
    wrong
        `[N]` bool.
    path
        PNG to write.
    title
        Above the picture.

    """
    figure = Figure(figsize=(5 * (1 + len(norms)), 4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(norms))
    for way, values in accuracies.items():
        left.plot(range(1, len(values) + 1), [100 * a for a in values], marker="o", ms=3, label=way)
    left.set(xlabel="epoch", ylabel="test accuracy, right labels, %", title=title)
    left.legend()
    for axes, (way, each) in zip(others, norms.items(), strict=True):
        each = each.clamp(min=1e-4).log10()
        bins = torch.linspace(float(each.min()), float(each.max()) + 1e-3, 50).tolist()
        for label, chosen in (("right label", ~wrong), ("wrong label", wrong)):
            axes.hist([10**v for v in each[chosen].tolist()], [10**b for b in bins], alpha=0.6, label=label)
        axes.set(xscale="log", xlabel="gradient norm of a training sample", ylabel="samples", title=way)
        axes.legend()
    for axes in (left, *others):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
