"""What an ensemble predicts, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psgrad.errors import ShapeError

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


def predicted_values(outputs: Any) -> Prediction:
    """Summarise `[K, N, ...]` values of a regression.

    Raises
    ------
    ShapeError
        If they are no tensor.

    """
    outputs = _tensor(outputs)
    return Prediction(outputs, outputs.mean(0), outputs.var(0, correction=0), None, None)


def predicted_classes(outputs: Any) -> Prediction:
    """Summarise `[K, N, classes, ...]` logits; the class axis is the third, as the losses have it.

    Raises
    ------
    ShapeError
        If they are no tensor, or not of two classes at least.

    """
    values = _tensor(outputs)
    if values.ndim < 3 or values.shape[2] < 2:
        raise ShapeError(
            "softmax is of [N, classes, ...] with two classes at least, a member returns"
            f' {tuple(values.shape[1:])}: say link="identity"; the sigmoid of single logits is yours to take'
        )
    members = values.softmax(2)
    mean = members.mean(0)
    entropy = _entropy(mean, 1)
    information = (entropy - _entropy(members, 2).mean(0)).clamp(min=0)
    return Prediction(members, mean, members.var(0, correction=0), entropy, information)


def _tensor(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    raise ShapeError(
        f"predict summarises one tensor, a member returns a {type(outputs).__name__}: use ens(x), or members"
        " that return what is predicted"
    )


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    return torch.special.entr(probabilities).sum(dim)
