"""The reduction of a loss that is called member by member of an ensemble, told by calling it.

What the members' losses add up to does not show it: their graph is that of `torch.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from psgrad.loss.marks import Output, mark_of
from psgrad.loss.reduction import LossReduction

__all__ = ["doubled", "judge_member_loss"]


def doubled(loss: Callable[..., Tensor], *example: Tensor) -> tuple[Tensor, Tensor]:
    """Call a loss with `example`, and with every tensor of it twice over along axis 0."""
    with torch.no_grad():
        return loss(*example), loss(*(torch.cat([t, t]) for t in example))


def judge_member_loss(loss: Callable[..., Tensor], outputs: Any, targets: Any, own: bool) -> None:
    """Raise if the loss of one member is not what was said of it, where `outputs` are captured.

    Parameters
    ----------
    loss
        From `[N, ...]` and targets to a scalar.
    outputs
        `[K, N, ...]`, of the ensemble.
    targets
        `[N, ...]`, or with `own` `[K, N, ...]`.
    own
        Whether targets have the member axis.

    Raises
    ------
    ConfigError
        As said. A loss that is neither kept nor doubled, cannot be called on twice as many rows, or is not
        on the CPU after the first batch, is let pass.

    """
    node: Any = outputs.grad_fn if isinstance(outputs, Tensor) else None
    output = mark_of(node) if node is not None else None
    check = output.check() if output is not None else None
    if check is None or not isinstance(targets, Tensor):
        return
    assert isinstance(output, Output)
    if check.asks(loss, on_device=outputs.device.type != "cpu"):
        found = _reduction(loss, outputs[0].detach(), targets[0] if own else targets)
        if found is not None:
            check.judge_reduction(found, output.samples, getattr(loss, "__name__", type(loss).__name__))


def _reduction(loss: Callable[..., Tensor], outputs: Tensor, targets: Tensor) -> LossReduction | None:
    try:
        with torch.random.fork_rng(devices=[]):
            once, twice = (value.double().item() for value in doubled(loss, outputs, targets))
    except Exception:  # a loss for so many rows only
        return None
    for reduction, expected in (("mean", once), ("sum", 2 * once)):
        if once and math.isclose(twice, expected, rel_tol=1e-2):
            return reduction  # type: ignore[return-value]  # two literals
    return None
