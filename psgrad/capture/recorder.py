"""One backward pass after the other: what layers contribute goes to the consumer, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from psgrad.capture.contribution import Contribution
from psgrad.capture.repeatable import Gate, RepeatableCall
from psgrad.errors import CaptureError, ConfigError, ShapeError

__all__ = [
    "Consumer",
    "ForwardCall",
    "Recorder",
    "frozen",
    "leaves_for",
    "not_captured",
    "refuse_changed",
    "trainable_of",
]


class Consumer(Protocol):
    """Who is told what a backward pass captured."""

    @property
    def once(self) -> bool:
        """Whether a sample may contribute once, so that backward goes once through a forward pass."""

    def add(self, contribution: Contribution) -> None:
        """Take one contribution, during backward, in the order in which backward reaches the layers."""

    def finish(self, samples: int) -> None:
        """Backward has ended and all N samples' contributions were added."""

    def abandon(self) -> None:
        """Backward ended in an error: drop what was added."""


@dataclass
class ForwardCall:
    """One call of something captured.

    Attributes
    ----------
    task
        The backward pass that has come through it.

    """

    task: int | None = None


class Recorder:
    """Tells `consumer` about every backward pass; `check` is called before it finishes.

    `anchor` is the leaf that every captured node leads to. Where a pass does not reach it, nobody asked for
    gradients of parameters: `torch.autograd.grad` of an input, say, of which nothing is told.
    """

    def __init__(self, consumer: Consumer, check: Callable[[], None], anchor: Tensor) -> None:
        self._consumer = consumer
        self._check = check
        self._leaf = torch.autograd.graph.get_gradient_edge(anchor).node
        self._task: int | None = None
        self._seen: tuple[str, int] | None = None
        self._device_type = "cpu"
        self._calls: list[RepeatableCall] = []
        self._alone: str | None = None  # a layer that was called outside of every repeatable call
        self._instead: Callable[[Contribution], None] | None = None  # of the consumer, while running again

    def reached(self, call: RepeatableCall) -> None:
        """Go on into a repeatable call's graph; part of `backward`.

        Raises
        ------
        CaptureError
            As `record`.

        """
        if not self._adds_up():
            call.only_to_inputs()
            return
        self._begin("the module's output")
        self._calls.append(call)
        try:
            call.first()
        except BaseException:
            self.abandon()
            raise

    def record(self, contribution: Contribution, call: ForwardCall, gate: Gate | None = None) -> None:
        """Hand over what a layer contributed, in this gate's call or outside of any; part of `backward`.

        In a pass that only computes gradients of other tensors (`torch.autograd.grad`) nothing is done.

        Raises
        ------
        CaptureError
            If this backward pass runs inside of another one, or after one that failed, or came into the
            repeatable call by another way than its outputs; or came a second time, where once is all.
        ShapeError
            If it has another number of samples than what came before in this backward pass.

        """
        if not self._adds_up():
            return
        if gate is None:
            self._begin(contribution.path)
            self._check_once(contribution.path, call)
            self._alone = self._alone or contribution.path
        else:
            gate.check(repr(contribution.path))
        path, samples = self._seen = self._seen or (contribution.path, contribution.samples)
        if contribution.samples != samples:
            raise ShapeError(
                f"one backward pass saw {samples} samples in {path!r} and {contribution.samples} in "
                f"{contribution.path!r}: all inputs of a backward pass need the same batch"
            )
        if not contribution.parameters:
            self._check()  # which says what was frozen since
        self._device_type = contribution.parameters[0].device.type
        with self._full_precision():
            (self._instead or self._consumer.add)(contribution)

    def _adds_up(self) -> bool:
        """Whether this pass adds to the gradients of leaves, as `backward` does."""
        return torch._C._will_engine_execute_node(self._leaf)

    def _begin(self, path: str) -> None:
        """Have the end of this backward pass told, if nothing of it was reached before.

        Raises
        ------
        CaptureError
            As `record`.

        """
        task = torch._C._current_graph_task_id()
        if self._task not in (None, task):
            self.abandon()
            raise CaptureError(
                f"{path!r}: backward reached this layer from inside another backward, or after "
                "one that failed. Use torch.utils.checkpoint with use_reentrant=False, or run the forward "
                "pass again."
            )
        if self._task is None:
            self._task = task
            self._seen = None
            Variable._execution_engine.queue_callback(self._finish)

    def _check_once(self, path: str, call: ForwardCall) -> None:
        if self._consumer.once and call.task not in (None, self._task):
            self.abandon()
            raise CaptureError(
                f"{path!r}: backward came a second time through one forward pass (retain_graph), so that its "
                "samples would add their clipped gradients twice, beyond any bound on one. Add up the losses "
                "and call backward once."
            )
        call.task = self._task

    def again(self, take: Callable[[Contribution], None], leaves: Sequence[Tensor], *, keep: bool) -> None:
        """Run the repeatable calls' backward once more, and hand what layers contribute to `take`.

        To be called by the consumer while it finishes.

        Parameters
        ----------
        take
            Is told every contribution.
        leaves
            Those that every layer's node leads to: other ones got their gradient the first time.
        keep
            Whether it can be run once more.

        Raises
        ------
        ConfigError
            If a layer had contributed outside of every repeatable call.

        """
        if self._alone is not None:
            raise ConfigError(
                f"{self._alone!r} was called by itself, not by the attached module's forward: its backward "
                "cannot run twice, as this memory_budget asks for. Call the attached module as a whole, "
                "attach to what is called, or give a larger memory_budget."
            )
        self._instead = take
        try:
            for call in self._calls:
                call.again(leaves, keep=keep)
        finally:
            self._instead = None
        if not keep:
            self.end_calls()

    def end_calls(self) -> None:
        """Let go of the repeatable calls' graphs."""
        for call in self._calls:
            call.end()
        self._calls.clear()

    def forget_failed(self) -> None:
        """Drop what a backward pass left that ended in an error: called where none is running."""
        if self._task is not None and torch._C._current_graph_task_id() == -1:
            self.abandon()

    def abandon(self) -> None:
        """Drop what this backward pass has captured."""
        self._reset()
        self._consumer.abandon()

    def _reset(self) -> None:
        self.end_calls()
        self._task = self._alone = None

    def _finish(self) -> None:
        try:
            self._check()
            if self._seen is not None:
                with torch.no_grad(), self._full_precision():
                    self._consumer.finish(self._seen[1])
        except BaseException:
            self._consumer.abandon()
            raise
        finally:
            self._reset()

    def _full_precision(self) -> AbstractContextManager[object]:
        """Without autocast, should `backward` have been called in it."""
        if not torch.is_autocast_enabled(self._device_type):
            return nullcontext()
        return torch.autocast(self._device_type, enabled=False)


def not_captured(name: str) -> Callable[[Tensor], None]:
    """Return a hook that refuses the ordinary gradient of a parameter, by its path."""

    def hook(p: Tensor) -> None:
        raise CaptureError(
            f"parameter {name!r} got an ordinary gradient: it was used outside of the module that psgrad is "
            "attached to, where no per-sample gradient could be captured. Use it inside that module's "
            "forward, or freeze it; a penalty on weights belongs in the optimizer (weight_decay)."
        )

    hook.of_psgrad = True  # type: ignore[attr-defined]  # tells it from hooks of others
    return hook


def leaves_for(
    inputs: Sequence[Any], trainable: Mapping[str, nn.Parameter], anchors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the anchors, if a backward pass to `inputs` alone is to reach all captured parameters.

    Raises
    ------
    CaptureError
        If it is to reach only some, of which there is no norm over all.

    """
    asked = {id(t) for t in inputs}
    missing = [name for name, p in trainable.items() if id(p) not in asked]
    if len(missing) == len(trainable):
        return []
    if missing:
        raise CaptureError(
            "backward(inputs=...) names some of the parameters that psgrad is attached to, and not "
            f"{', '.join(missing)}: a sample's gradient would be computed in part. Name all of them, or "
            "freeze those (requires_grad_(False)) before attaching"
        )
    return anchors


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
            f"{', '.join(changed)}: remove() the handle and attach a new one (and remove() it before "
            "torch.func.functional_call, which shows a module other parameters)"
        )


def trainable_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's trainable parameters by path, each once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def frozen(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> bool:
    """Whether all that a capture was attached to is frozen now, and nothing else of the module to train.

    Then there is no gradient to capture: a discriminator is frozen while a generator trains through it.
    """
    return not any(p.requires_grad for p in trainable.values()) and not trainable_of(module)
