"""As `psgrad.held`, in a bounded number of bytes: where they are too few, backward runs a second time.

The norms of a batch are known when backward has reached every layer, and the clipped sum needs every layer
again. `Held` keeps what it needs; here, what does not fit is let go of once its norm is taken, and comes
again in a second backward pass, in which every layer adds its weighted sum at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from psgrad.capture import Capture, Contribution, LayerUse, PerParameter
from psgrad.capture.computed import Carried
from psgrad.errors import ConfigError
from psgrad.held import Held, added_up, weighted_sums
from psgrad.per_sample import accumulate

__all__ = ["WithinBudget"]


class WithinBudget:
    """What `Held` does, in `budget` bytes.

    Parameters
    ----------
    budget
        Bytes of tensors to hold at most between layers: inputs and output gradients of layers, written-out
        per-sample gradients. Inputs count, though most are alive for other reasons too.
    capture
        Runs backward again.

    Attributes
    ----------
    passes
        How often backward ran for what was released last: 1 if all could be held; else 2, and once more where
        it showed only then that it could not, or that parameters are used several times.

    Notes
    -----
    The norm of a parameter that is used several times is that of the sum of its uses, which have to be held.
    Where these alone exceed the budget, `ConfigError` says so.

    """

    def __init__(self, budget: int, capture: Capture) -> None:
        self._budget = budget
        self._capture = capture
        self._held = _Sparing()
        self._too_many = math.inf  # the fewest samples known not to fit
        self._several: set[nn.Parameter] = set()  # known to be used several times
        self.passes = 0
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self._runs = 1
        self._start()

    def _start(self) -> None:
        self._held.clear()
        self._sq_norms: PerParameter = {}  # of what is let go of
        self._seen: set[nn.Parameter] = set()
        self._samples = 0
        self._most = 0  # bytes: no more than this is held
        self._complete = True

    def add(self, contribution: Contribution) -> None:
        """See `Held.add`.

        Raises
        ------
        ConfigError
            If what cannot be let go of exceeds the budget.

        """
        self._samples = contribution.samples
        repeated = self._seen.intersection(contribution.parameters)
        self._seen.update(contribution.parameters)
        if not repeated <= self._several:
            self._several |= repeated
            self._complete = self._complete and self._fits  # else one use was let go of
        if not self._complete:
            return
        if self._fits or not self._several.isdisjoint(contribution.parameters):
            self._held.add(contribution)
            self._most += max(_bytes(contribution.tensors()), 2 * _written_bytes(contribution))
            self._check_budget()
        else:
            self._sq_norms |= contribution.sq_norms()

    @property
    def _fits(self) -> bool:
        """Whether so many samples may fit."""
        return self._samples < self._too_many

    def _check_budget(self) -> None:
        if self._most <= self._budget:
            return
        self._most = self._held.nbytes()
        if self._most <= self._budget:
            return
        if not self._fits:
            paths = ", ".join(map(repr, self._held.paths()))
            raise ConfigError(
                f"memory_budget={self._budget:,} is too little for {self._samples} samples: parameters of "
                f"{paths} are used several times, and the norm of a sum needs all uses at once. Held so far "
                f"are {self._most:,} bytes. Give more, or train on smaller physical batches."
            )
        self._too_many = self._samples
        self._complete = False
        self._held.clear()

    def sq_norms(self, groups: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, Tensor]:
        """See `Held.sq_norms`.

        Raises
        ------
        ConfigError
            If what cannot be let go of exceeds the budget, or backward cannot run again.

        """
        self._settle()
        while not self._complete:
            self._start()
            self._run_again(self.add, keep=True)
            self._settle()
        held = self._held.sq_norms(groups)
        found = {}
        for name, group in groups.items():
            terms = [self._sq_norms[p] for p in group if p in self._sq_norms]
            terms += [held[name]] if name in held else []
            if terms:
                found[name] = added_up(terms)
        return found

    def _settle(self) -> None:
        self._held.settle()  # which may take more
        self._most = self._held.nbytes()
        self._check_budget()

    def release(self, factors: PerParameter) -> None:
        """See `Held.release`."""
        if not self._sq_norms:
            self._capture.no_more()
            self._held.release(factors)
        else:
            self._release_again(factors)
        self.passes = self._runs
        self.clear()

    def _release_again(self, factors: PerParameter) -> None:
        sums: PerParameter = {}

        def take(contribution: Contribution) -> None:
            for p, added in weighted_sums(contribution, factors).items():
                sums[p] = sums[p] + added if p in sums else added

        self._held.clear()
        self._run_again(take, keep=False)
        for p, total in sums.items():
            accumulate(p, total)

    def _run_again(self, take: Callable[[Contribution], None], *, keep: bool) -> None:
        self._runs += 1
        self._capture.again(take, keep=keep)


class _Sparing(Held):
    """`Held` in the form that takes less memory, not in the faster one."""

    def _form(self, contribution: Contribution) -> Contribution:
        once = isinstance(contribution, (LayerUse, Carried))
        if once and _written_bytes(contribution) >= _bytes(contribution.tensors()):
            return contribution
        return contribution.kept()


def _written_bytes(contribution: Contribution) -> int:
    return contribution.samples * sum(p.nbytes for p in contribution.parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)
