"""`attach`: the capture of a module, which may bring its own."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from psgrad.capture.capture import Capture
from psgrad.capture.recorder import Consumer

__all__ = ["Attached", "attach"]


class Attached(Protocol):
    """A capture that tells its consumer about every backward pass, until it is removed."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The module's trainable parameters by path, each once."""

    @property
    def gradients_per_sample(self) -> int:
        """How many gradients a sample has: 1, or K where the module is K models on the same samples."""

    def remove(self) -> None:
        """Give the module back as it was."""


def attach(module: nn.Module, consumer: Consumer, rows_per_sample: int) -> Attached:
    """Capture `module` for a consumer that takes a sample to have several gradients where it has.

    A module that is several models at once has a method `per_sample_capture(consumer, rows_per_sample)`;
    its contributions have `[K, N]` where those of `Capture` have `[N]`. The arguments and errors are those of
    `Capture`.
    """
    own = getattr(module, "per_sample_capture", None)
    return Capture(module, consumer, rows_per_sample) if own is None else own(consumer, rows_per_sample)
