"""The two ways in which a loss may combine its batch."""

from __future__ import annotations

from typing import Literal

from psgrad.errors import ConfigError

__all__ = ["LossReduction", "checked_reduction"]

LossReduction = Literal["mean", "sum"]


def checked_reduction(loss_reduction: str) -> LossReduction:
    """Return the argument, or raise `ConfigError` if it is no loss reduction.

    Raises
    ------
    ConfigError
        As said.

    """
    if loss_reduction not in ("mean", "sum"):
        raise ConfigError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
    return loss_reduction  # type: ignore[return-value]  # just checked
