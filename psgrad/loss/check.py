"""`LossCheck`: whether the loss that backward starts from is what was said of it."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

from torch import Tensor

from psgrad.errors import ConfigError
from psgrad.loss import starts
from psgrad.loss.marks import mark
from psgrad.loss.mixing import heads_of
from psgrad.loss.reduction import LossReduction
from psgrad.loss.terms import Term, terms_of

__all__ = ["LossCheck"]


class LossCheck:
    """Look at every loss over a model's outputs, at the beginning of its backward pass.

    Where the graph shows for certain that the loss is not what `loss_reduction` says, `backward` raises
    before it computes anything. What is not certain is let pass: a loss of one's own that divides by a
    tensor, a compiled loss, `backward` with a gradient given to it, losses far below other modules.

    Parameters
    ----------
    loss_reduction
        What was said.
    samples_must_not_mix
        Whether a loss that mixes samples raises, as does a mean by a divisor that depends on the whole batch
        (class weights, ignored targets), because another sample would change what a sample contributes; or
        warns once, because norms would be others, or off by a factor.

    """

    def __init__(self, loss_reduction: LossReduction, *, samples_must_not_mix: bool) -> None:
        self._said = loss_reduction
        self._strict = samples_must_not_mix
        self._warned = self._looked = False
        self._last: object = None  # a member's loss
        self._unseen = BATCHES  # of so many at most it is looked at whether samples are mixed

    def watch(self) -> None:
        """Look from now on."""
        starts.watch(self, _look)

    def unwatch(self) -> None:
        """Look no more, and leave nothing behind. Twice is as good as once."""
        starts.unwatch(self)

    def mark(self, out: Any, samples: int, rows: int, members: tuple[int, ...] = ()) -> None:
        """Take `out`, of N > 0 samples in so many rows, for what the losses are over; of (K,) members."""
        mark(out, self, samples, rows, members)
        if self._unseen and samples > 1:
            _unsure.add(self)

    def asks(self, loss: object, on_device: bool) -> bool:
        """Whether a member's loss is to be called: another one than last, or the first that is to wait."""
        last, self._last = self._last, loss
        return last is None if on_device else last is not loss

    def judge_reduction(self, found: LossReduction, samples: int, name: str) -> None:
        """Raise if a loss over N samples is not what was said.

        Raises
        ------
        ConfigError
            As said, with what to do.

        """
        if found != self._said and samples > 1:
            times = f"{samples} times" if found == "sum" else f"1/{samples} of"
            raise ConfigError(
                f"the loss is the {found} over the batch ({name}), but loss_reduction is {self._said!r}: "
                f"norms would be {times} those of the samples' own gradients. Give "
                f'loss_reduction="{found}", or {ADVICE[self._said]} the loss over the batch'
            )

    def judge(self, terms: list[Term]) -> None:
        """Raise for the terms of a loss over N samples that are not what was said.

        Raises
        ------
        ConfigError
            As said, with what to do.

        """
        samples = terms[0].output.samples
        largest = max(terms, key=lambda term: term.factor)
        found = largest.reduction
        expected = {"mean": 1 / samples, "sum": 1.0}
        distance = {reduction: abs(math.log(largest.factor / f)) for reduction, f in expected.items()}
        # A factor of 2 or 3 is as good as none (two losses added up, one weighted by 0.4); between N and 1
        # it must be clear which is nearer. Sums over N are let pass, whatever was said: N may be a constant,
        # the expected size of the batch, that a batch happens to have.
        near = distance[found] <= math.log(3) and distance[self._said] - distance[found] > math.log(1.99)
        if near and not any(term.reduction == self._said and 0.5 <= term.scale <= 2 for term in terms):
            self.judge_reduction(found, samples, largest.name)
        if largest.factor > LARGEST_FACTOR:
            self._report(
                f"the loss of a sample is multiplied by {largest.factor:.3g} before backward, and gradients "
                "are clipped and measured after that: torch.amp.GradScaler does so. Use bfloat16 autocast, "
                "which needs no scaler"
            )
        if self._said == "mean":
            self._judge_divisors(terms)

    def judge_mixing(self, mixes: bool | None) -> None:
        """Raise if a loss mixes samples; where that was not to be told, have the next ones looked at.

        Raises
        ------
        ConfigError
            As said, with what to do.

        """
        _unsure.discard(self)
        self._unseen = self._unseen - 1 if mixes is None else 0
        if not mixes:
            return
        effect = (
            "one sample more would change the others' gradients too, and no bound on it would hold"
            if self._strict
            else "a sample's gradient, and its norm, depend on who else is in the batch"
        )
        what = (
            "the loss mixes samples (it compares them, or has a softmax, a centre or a root over the batch): "
            f"{effect}. Take a loss that is a sum over samples, each with its own outputs alone; compare a "
            "sample with public data, or with its own variants, which rows_per_sample makes one sample"
        )
        if self._strict:
            self._unseen = BATCHES  # for who goes on
            raise ConfigError(what)
        warnings.warn(what, stacklevel=2)

    def _judge_divisors(self, terms: list[Term]) -> None:
        divided = [term for term in terms if hasattr(term.node, "_saved_total_weight")]
        # To look at what is not on the CPU is to wait for it: once.
        whys = [why for term in divided if not (self._looked and term.on_device) and (why := _divisor(term))]
        self._looked |= bool(divided)
        if not whys:
            return
        reason = f"the loss is a mean that divides by {whys[0]}, which depends on the whole batch"
        effect = (
            "one sample would change what the others contribute, and no bound on it would hold"
            if self._strict
            else "norms are off those of the samples' own losses by a factor, the same for all of a batch"
        )
        self._report(f'{reason}: {effect}. Use reduction="sum" in the loss and loss_reduction="sum"')

    def _report(self, what: str) -> None:
        """Raise where samples must not mix; else warn, once.

        Raises
        ------
        ConfigError
            As said.

        """
        if self._strict:
            raise ConfigError(what)
        if not self._warned:
            self._warned = True
            warnings.warn(what, stacklevel=2)


LARGEST_FACTOR = 1000.0
"""Beyond, a sample's loss is multiplied on behalf of its dtype, not of its meaning."""

BATCHES = 3
"""How many of a handle's losses are differentiated twice, until one shows whether samples are mixed."""

_unsure: weakref.WeakSet[LossCheck] = weakref.WeakSet()
"""Whose next loss is to be differentiated twice."""

ADVICE = {"mean": "average", "sum": "sum"}


def _divisor(term: Term) -> str | None:
    """Say what a mean divides by, if that is not in proportion to the number of samples."""
    node, samples = term.node, term.output.samples
    target, weight, total = node._saved_target, node._saved_weight, node._saved_total_weight
    if term.reduction != "mean":
        return None
    if weight is not None:
        return None if bool((weight == weight[:1]).all()) else "the weights of its targets' classes"
    if total.item() == target.numel() or target.numel() % samples:
        return None
    counts = target != _signed(node._saved_ignore_index)
    # of every sample as many, in whichever order the rows of N samples were flattened
    for by_sample in (counts.reshape(samples, -1).sum(1), counts.reshape(-1, samples).sum(0)):
        if bool((by_sample == by_sample[0]).all()):
            return None
    return f"the number of targets that are not ignored, {int(total)} of {target.numel()}"


def _signed(index: int) -> int:
    """Nodes hold negative numbers as unsigned ones of 64 bits."""
    return index - (1 << 64) if index >> 63 else index


def _look(roots: list[Tensor]) -> None:
    """Judge the loss that these scalars add up to, by each model that it is of."""
    by_check: dict[LossCheck, list[Term]] = {}
    for root in roots:
        try:
            terms = terms_of(root.grad_fn)
        except RuntimeError:  # freed by a backward pass before: which backward will tell
            return
        for term in terms:
            check = term.output.check()
            if check is not None:
                by_check.setdefault(check, []).append(term)
    for check, terms in by_check.items():
        check.judge(terms)
    if _unsure:
        for head in heads_of(roots):
            found = {output.check() for output in head.outputs.values()}
            checks = [check for check in found if check is not None and check in _unsure]
            mixes = head.mixes() if checks else None
            for check in checks:
                check.judge_mixing(mixes)
