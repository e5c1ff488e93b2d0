"""The parts of an update that SGD and Adam share, for numbers and for columns of them."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.ensemble.optim.base import Columns
from psgrad.ensemble.optim.per_member import Hyperparameter, PerMember, numbers_of

__all__ = ["add_scaled", "decayed"]


def add_scaled(
    into: list[Tensor], what: list[Tensor] | tuple[Tensor, ...], factor: Hyperparameter, columns: Columns
) -> None:
    """`into += factor * what`, in place, each `[K, ...]`."""
    if isinstance(factor, PerMember):
        torch._foreach_add_(into, torch._foreach_mul(what, columns(factor)))
    else:
        torch._foreach_add_(into, what, alpha=factor)


def decayed(
    grads: list[Tensor], parameters: list[Tensor], decay: Hyperparameter, columns: Columns
) -> list[Tensor]:
    """Gradients plus `decay` times the parameters; the gradients themselves if no member decays."""
    if not any(numbers_of(decay)):
        return grads
    if isinstance(decay, PerMember):
        return list(torch._foreach_add(torch._foreach_mul(parameters, columns(decay)), grads))
    return list(torch._foreach_add(grads, parameters, alpha=decay))
