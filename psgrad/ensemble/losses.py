"""K losses from K outputs: at once for the common ones, else under `torch.vmap` or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.ensemble.loop import loop_members
from psgrad.ensemble.own import part_of
from psgrad.ensemble.purity import leaves_nothing
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.errors import ShapeError

__all__ = ["member_losses", "scalar", "stacked_losses"]

_IGNORED = -100  # PyTorch's default ignore_index


def member_losses(
    fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, own: bool, randomness: MemberRandomness
) -> Tensor:
    """`[K]` losses `fn(outputs[k], targets)`, with own targets `fn(outputs[k], targets[k])`.

    Raises
    ------
    ShapeError
        If `fn` does not return a scalar.

    """
    members = len(randomness)
    if _is_cross_entropy(fn) and isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        y = targets if own else targets.expand(members, *targets.shape)
        fits = outputs.ndim >= 3 and outputs.shape[:2] + outputs.shape[3:] == y.shape
        if fits and not y.is_floating_point():
            each = F.cross_entropy(outputs.flatten(0, 1), y.flatten(0, 1), reduction="none")
            return each.reshape(members, -1).sum(1) / (y != _IGNORED).reshape(members, -1).sum(1)

    def one(output: Any, target: Any) -> Tensor:
        return scalar(fn(output, target))

    if leaves_nothing(fn):
        with suppress(Exception):  # what vmap cannot do; alone, fn raises what is its own
            return torch.vmap(one, (0, 0 if own else None), randomness="error")(outputs, targets)
    return torch.stack(
        loop_members(
            lambda k: one(part_of(outputs, k), part_of(targets, k) if own else targets), members, randomness
        )
    )


def stacked_losses(losses: Sequence[Any]) -> Tensor:
    """`[K]` of K losses.

    Raises
    ------
    ShapeError
        If one is no scalar.

    """
    return torch.stack([scalar(loss) for loss in losses])


def scalar(loss: Any) -> Tensor:
    """Return a member's loss.

    Raises
    ------
    ShapeError
        If it is no tensor, or has an axis.

    """
    if isinstance(loss, Tensor) and not loss.ndim:
        return loss
    found = tuple(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ShapeError(f"the loss must be a scalar tensor, a member's is {found}")


def _is_cross_entropy(fn: Callable[..., Any]) -> bool:
    if type(fn) is nn.CrossEntropyLoss:
        plain = fn.weight is None and fn.label_smoothing == 0 and fn.reduction == "mean"
        return plain and fn.ignore_index == _IGNORED
    return fn is F.cross_entropy
