"""Whether a loss combines its batch as `loss_reduction` says."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from psgrad.errors import ConfigError
from psgrad.loss import LossReduction, checked_reduction
from psgrad.loss.called import doubled

__all__ = ["check_loss_reduction"]


def check_loss_reduction(
    criterion: Callable[..., Tensor], loss_reduction: LossReduction, *example: Tensor
) -> None:
    """Raise if a loss does not combine its batch as said: every norm would be off by a factor of N.

    A torch loss says it itself (`criterion.reduction`). Any other callable is called with `example` and
    with each tensor of it twice over along axis 0: a mean stays, a sum doubles.

    Parameters
    ----------
    criterion
        The loss: a module of `torch.nn`, or any function of the tensors in `example`.
    loss_reduction
        "mean" or "sum".
    example
        What the loss is called with, batches with axis 0 of one length, for instance outputs and targets.
        Not needed where the loss has `.reduction`; then they are not looked at.

    Raises
    ------
    ConfigError
        If it is the other reduction, none at all, or if it cannot be told: no example, a value of zero or
        one that is not finite, or one that is neither kept nor doubled (such as cross-entropy with class
        weights under "mean", whose divisor depends on the whole batch).

    """
    wanted = checked_reduction(loss_reduction)
    name = getattr(criterion, "__name__", type(criterion).__name__)
    stated = getattr(criterion, "reduction", None)
    found = stated if isinstance(stated, str) else _called(criterion, name, example)
    if found == wanted:
        if (
            found == "mean"
            and getattr(criterion, "weight", None) is not None
            and hasattr(criterion, "ignore_index")
        ):
            raise ConfigError(
                f'{name} with class weights and reduction "mean" divides by the weights of the whole batch, '
                'so that samples mix: use reduction="sum" and loss_reduction="sum"'
            )
        return
    advice = (
        f'pass loss_reduction="{found}"' if found in ("mean", "sum") else "sum or average it over the batch"
    )
    raise ConfigError(
        f"{name} has reduction {found!r}, but loss_reduction is {wanted!r}: norms would be of other "
        f"gradients than the samples' own. Either {advice}, or use a loss with reduction {wanted!r}"
    )


def _called(criterion: Callable[..., Tensor], name: str, example: tuple[Tensor, ...]) -> str:
    if not example:
        raise ConfigError(f"{name} does not say its reduction: give an example to call it with")
    once, twice = doubled(criterion, *example)
    if once.ndim or twice.ndim:
        return "none"
    if not once.isfinite() or not once:
        raise ConfigError(f"{name} is {once.item()} on the example, from which nothing follows: give another")
    ratio = (twice.double() / once.double()).item()
    for reduction, expected in (("mean", 1.0), ("sum", 2.0)):
        if abs(ratio - expected) < 1e-2:
            return reduction
    raise ConfigError(
        f"{name} is neither a mean nor a sum over the batch: with every row twice it is "
        f"{ratio:.3g} times as much"
    )
