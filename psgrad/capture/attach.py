"""`attach`: the capture of a module, which may bring its own."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from psgrad.capture.capture import Capture
from psgrad.capture.recorder import Consumer
from psgrad.errors import ConfigError
from psgrad.loss import LossCheck

__all__ = ["Attached", "attach", "attach_repeatable"]


class Attached(Protocol):
    """A capture that tells its consumer about every backward pass, until it is removed."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The module's trainable parameters by path, each once."""

    @property
    def gradients_per_sample(self) -> int:
        """How many gradients a sample has: 1, or K where the module is K models on the same samples."""

    @property
    def sample_axis(self) -> int:
        """Axis of the samples in contributions: 0 of `[N, *shape]`, 1 of an ensemble's `[K, N, *shape]`."""

    @property
    def regions(self) -> dict[str, str]:
        """By path, the modules that run one sample at a time, as far as is known, and why."""

    def remove(self) -> None:
        """Give the module back as it was."""


def attach(
    module: nn.Module, consumer: Consumer, rows_per_sample: int, loss: LossCheck | None = None
) -> Attached:
    """Capture `module` for a consumer that takes a sample to have several gradients where it has.

    A module that is several models at once has a method
    `per_sample_capture(consumer, rows_per_sample, loss)`; its contributions have `[K, N]` where those of
    `Capture` have `[N]`. The arguments and errors are those of `Capture`.
    """
    own = getattr(module, "per_sample_capture", None)
    if own is None:
        return Capture(module, consumer, rows_per_sample, loss)
    return own(consumer, rows_per_sample, loss)


def attach_repeatable(
    module: nn.Module, consumer: Consumer, rows_per_sample: int, loss: LossCheck | None = None
) -> Capture:
    """Capture `module` for a consumer that may have its backward run again, as `attach` with a memory budget.

    Raises
    ------
    ConfigError
        If the module brings its own capture.

    """
    if hasattr(module, "per_sample_capture"):
        raise ConfigError(
            f"memory_budget is for one model, and {type(module).__name__} is several: leave it out, or train "
            "on smaller physical batches"
        )
    return Capture(module, consumer, rows_per_sample, loss, repeatable=True)
