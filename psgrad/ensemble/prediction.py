"""What an ensemble predicts, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Prediction", "predicted_classes", "predicted_values"]


@dataclass(frozen=True)
class Prediction:
    """The members' predictions and what they say together.

    Attributes
    ----------
    members
        `[K, N, ...]`: every member's class probabilities, or its values.
    mean
        `[N, ...]` over the members.
    variance
        `[N, ...]` over the members, divided by K; 0 for one member.
    entropy
        `[N]` nats: of the mean probabilities, the total uncertainty. None for values.
    mutual_information
        `[N]` nats, at least 0: the entropy less the members' mean entropy, what they disagree about.
        None for values.

    """

    members: Tensor
    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


def predicted_values(outputs: Tensor) -> Prediction:
    """Summarise `[K, N, ...]` values of a regression."""
    return Prediction(outputs, outputs.mean(0), outputs.var(0, correction=0), None, None)


def predicted_classes(logits: Tensor) -> Prediction:
    """Summarise `[K, N, classes, ...]` logits; the class axis is the third, as the losses have it."""
    members = logits.softmax(2)
    mean = members.mean(0)
    entropy = _entropy(mean, 1)
    information = (entropy - _entropy(members, 2).mean(0)).clamp(min=0)
    return Prediction(members, mean, members.var(0, correction=0), entropy, information)


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    return torch.special.entr(probabilities).sum(dim)
