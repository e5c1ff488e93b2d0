"""`MemberCapture`: every member's per-sample gradients, from one backward pass of the ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from psgrad.capture import Consumer, Contribution
from psgrad.capture.recorder import frozen, leaves_for, not_captured, refuse_changed, trainable_of
from psgrad.capture.region import first_rows
from psgrad.capture.shadow import shadow_forward, unshadow_forward
from psgrad.capture.survey import refuse_mixing, why_not_shadowed
from psgrad.capture.synchronised import refuse_synchronised
from psgrad.ensemble.interpreter import UnlikeError
from psgrad.ensemble.own import Arguments, arguments_of
from psgrad.ensemble.per_sample.folded import FoldedCapture
from psgrad.ensemble.per_sample.looped import LoopedCapture, joined
from psgrad.errors import RefusedModelError, ShapeError
from psgrad.held import Held
from psgrad.loss import LossCheck
from psgrad.loss.starts import follow_inputs, unfollow_inputs

if TYPE_CHECKING:
    from psgrad.ensemble.ensemble import Ensemble

__all__ = ["MemberCapture"]


class MemberCapture:
    """Attach to an ensemble until `remove()` and tell `consumer` about every backward pass.

    What `psgrad.capture.Capture` is for one model: contributions are to the stacked parameters `[K, *shape]`,
    and have `[K, N]` where those of a model have `[N]`. Members that a backward pass does not reach
    contribute zeros.

    Parameters
    ----------
    ensemble
        Its `forward` is shadowed on the instance; a copy is free of the capture.
    consumer
        Is told.
    rows_per_sample
        The consecutive rows of a member's batch that make one sample.
    loss
        Judges the losses that `Ensemble.loss` is given, over what the ensemble returns.

    Raises
    ------
    RefusedModelError
        As `Capture`, by paths in the member.

    """

    def __init__(
        self,
        ensemble: Ensemble,
        consumer: Consumer,
        rows_per_sample: int,
        loss: LossCheck | None = None,
    ) -> None:
        if (why := why_not_shadowed(ensemble)) is not None:
            raise RefusedModelError(f"no per-sample gradients for this ensemble: {why}")
        self._ensemble = ensemble
        self._consumer = consumer
        self._loss = loss
        self._rows_per_sample = rows_per_sample
        self._held = [Held() for _ in range(ensemble.members)]
        self._open: set[_Part] = set()  # what the present backward pass reached and has not ended
        self._samples: int | None = None
        self._tried = False  # whether a batch has told that samples are not mixed
        members = [_Part(self, held.add) for held in self._held]
        self._looped = LoopedCapture(ensemble.stacked, members, rows_per_sample)
        self._trainable = trainable_of(ensemble)
        self._folded = FoldedCapture(
            ensemble.stacked, ensemble.execution, _Part(self, consumer.add), self._check, rows_per_sample
        )
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(not_captured(name)) for name, p in self._trainable.items()
        ]
        shadow_forward(ensemble, self._run)
        follow_inputs(self)
        if loss is not None:
            loss.watch()

    @property
    def gradients_per_sample(self) -> int:
        """K, the number of members."""
        return len(self._held)

    sample_axis = 1
    """Of the samples in contributions, `[K, N, *shape]`."""

    @property
    def regions(self) -> dict[str, str]:
        """See `psgrad.capture.attach.Attached`: what runs how is in the ensemble's plan."""
        return {}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The stacked trainable parameters by path, each once; other ones than at first are refused."""
        return self._trainable

    def leaves_for(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """See `psgrad.loss.starts.Leads`."""
        return leaves_for(inputs, self._trainable, [self._folded.anchor, *self._looped.anchors])

    def remove(self) -> None:
        """Give the ensemble back as it was. Twice is as good as once."""
        unfollow_inputs(self)
        if self._loss is not None:
            self._loss.unwatch()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._looped.remove()
        unshadow_forward(self._ensemble)

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the ensemble, captured if gradients are being recorded and anything is to train."""
        inputs, own = _inputs_of(self._ensemble.stacked, *args, **kwargs)
        if not torch.is_grad_enabled() or frozen(self._ensemble, self._trainable):
            return forward(*args, **kwargs)
        refuse_synchronised()
        if self._open and torch._C._current_graph_task_id() == -1:
            self.abandon()  # a backward pass ended in an error
        ensemble = self._ensemble
        ensemble.check_own(inputs, own)
        self._check()
        refuse_mixing(ensemble.stacked)
        of_first = inputs.of(0, own)
        rows = first_rows(list(of_first), {})
        if not self._tried and rows and rows > self._rows_per_sample:
            self._looped.try_first(of_first)
            self._tried = True
        out = self._run_members(inputs, own)
        if self._loss is not None and rows:
            self._loss.mark(out, rows // self._rows_per_sample, rows, (len(self._held),))
        return out

    def _run_members(self, inputs: Arguments, own: bool) -> Any:
        ensemble = self._ensemble
        graph = self._folded.graph_for(inputs, own, ensemble.members, ensemble.randomness)
        if not isinstance(graph, str):
            try:
                return self._folded.run(graph, inputs, own, ensemble.randomness)
            except UnlikeError as error:
                graph = str(error)
        ensemble.execution.note_loop(ensemble.members, graph)
        return self._looped.run(lambda k: inputs.of(k, own), ensemble.randomness)

    @property
    def once(self) -> bool:
        """See `psgrad.capture.Consumer`."""
        return self._consumer.once

    def _check(self) -> None:
        refuse_changed(self._trainable, trainable_of(self._ensemble))

    def reached(self, part: _Part) -> None:
        """The backward pass has reached a part of the ensemble."""
        self._open.add(part)

    def ended(self, part: _Part, samples: int) -> None:
        """The backward pass has ended for a part; the consumer is told after the last.

        Raises
        ------
        ShapeError
            If parts had batches of different sizes.

        """
        if self._samples not in (None, samples):
            first = self._samples
            self.abandon()
            raise ShapeError(
                f"members saw {first} and {samples} samples in one backward pass, which need be as many"
            )
        self._samples = samples
        self._open.discard(part)
        if self._open:
            return
        self._samples = None
        try:
            for contribution in joined(self._held, self._looped.whose, samples):
                self._consumer.add(contribution)
            self._consumer.finish(samples)
        finally:
            for held in self._held:
                held.clear()

    def abandon(self) -> None:
        """Drop what an unfinished backward pass left."""
        self._open.clear()
        self._samples = None
        for held in self._held:
            held.clear()
        self._consumer.abandon()


def _inputs_of(member: nn.Module, /, *inputs: Any, own: bool = False, **named: Any) -> tuple[Arguments, bool]:
    """Take the arguments of `Ensemble.forward`."""
    return arguments_of(member, inputs, named), own


class _Part:
    """One of the captures that a backward pass of the ensemble goes through, as its consumer."""

    def __init__(self, whole: MemberCapture, take: Callable[[Contribution], None]) -> None:
        self._whole = whole
        self._take = take

    @property
    def once(self) -> bool:
        """See `psgrad.capture.Consumer`."""
        return self._whole.once

    def add(self, contribution: Contribution) -> None:
        """Take a contribution; part of `backward`."""
        self._whole.reached(self)
        self._take(contribution)

    def finish(self, samples: int) -> None:
        """Tell that this part has ended; part of `backward`."""
        self._whole.ended(self, samples)

    def abandon(self) -> None:
        """Drop what the whole backward pass left."""
        self._whole.abandon()
