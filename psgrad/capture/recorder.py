"""One backward pass after the other: what layers contribute goes to the consumer, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from psgrad.capture.contribution import Contribution
from psgrad.errors import CaptureError, ShapeError

__all__ = ["Consumer", "Recorder", "not_captured", "refuse_changed", "trainable_of"]


class Consumer(Protocol):
    """Who is told what a backward pass captured."""

    def add(self, contribution: Contribution) -> None:
        """Take one contribution, during backward, in the order in which backward reaches the layers."""

    def finish(self, samples: int) -> None:
        """Backward has ended and all N samples' contributions were added."""

    def abandon(self) -> None:
        """Backward ended in an error: drop what was added."""


class Recorder:
    """Tells `consumer` about every backward pass; `check` is called before it finishes."""

    def __init__(self, consumer: Consumer, check: Callable[[], None]) -> None:
        self._consumer = consumer
        self._check = check
        self._task: int | None = None
        self._seen: tuple[str, int] = ("", 0)
        self._device_type = "cpu"

    def record(self, contribution: Contribution) -> None:
        """Hand over what a layer contributed; part of `backward`.

        Raises
        ------
        CaptureError
            If this backward pass runs inside of another one, or after one that failed.
        ShapeError
            If it has another number of samples than what came before in this backward pass.

        """
        task = torch._C._current_graph_task_id()
        if self._task not in (None, task):
            self.abandon()
            raise CaptureError(
                f"{contribution.path!r}: backward reached this layer from inside another backward, or after "
                "one that failed. Use torch.utils.checkpoint with use_reentrant=False, or run the forward "
                "pass again."
            )
        if self._task is None:
            self._task = task
            self._seen = (contribution.path, contribution.samples)
            Variable._execution_engine.queue_callback(self._finish)
        path, samples = self._seen
        if contribution.samples != samples:
            raise ShapeError(
                f"one backward pass saw {samples} samples in {path!r} and {contribution.samples} in "
                f"{contribution.path!r}: all inputs of a backward pass need the same batch"
            )
        self._device_type = contribution.parameters[0].device.type
        with self._full_precision():
            self._consumer.add(contribution)

    def forget_failed(self) -> None:
        """Drop what a backward pass left that ended in an error: called where none is running."""
        if self._task is not None and torch._C._current_graph_task_id() == -1:
            self.abandon()

    def abandon(self) -> None:
        """Drop what this backward pass has captured."""
        self._task = None
        self._consumer.abandon()

    def _finish(self) -> None:
        self._task = None
        self._check()
        with torch.no_grad(), self._full_precision():
            self._consumer.finish(self._seen[1])

    def _full_precision(self) -> AbstractContextManager[object]:
        """Without autocast, should `backward` have been called in it."""
        if not torch.is_autocast_enabled(self._device_type):
            return nullcontext()
        return torch.autocast(self._device_type, enabled=False)


def not_captured(name: str) -> Callable[[Tensor], None]:
    """Return a hook that refuses the ordinary gradient of a parameter, by its path."""

    def hook(p: Tensor) -> None:
        raise CaptureError(
            f"parameter {name!r} got an ordinary gradient: it was used outside of the module that owns it, "
            "where no per-sample gradient could be captured. Use it inside that module's forward, or freeze "
            "it; a penalty on weights belongs in the optimizer (weight_decay)."
        )

    return hook


def refuse_changed(before: Mapping[str, nn.Parameter], now: Mapping[str, nn.Parameter]) -> None:
    """Raise if the trainable parameters, by path, are not those that a capture was attached to.

    Raises
    ------
    CaptureError
        As said, by path.

    """
    changed = [name for name in sorted({**before, **now}) if before.get(name) is not now.get(name)]
    if changed:
        raise CaptureError(
            f"requires_grad, or the parameter, has changed since psgrad was attached, of "
            f"{', '.join(changed)}: remove() the handle and attach a new one"
        )


def trainable_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's trainable parameters by path, each once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
