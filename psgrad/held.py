"""What a backward pass captured, held until every layer's norms are known.

Per layer, one of two things is held: the written-out per-sample gradients, or the layer's input and output
gradient, from which one ordinary weight gradient on the scaled output gradient gives the weighted sum. The
layer's rule says which. Of a layer that is called several times, the calls are held until all are in.
Written gradients lie in memory that is the same in every step: none of it is handed out.
Written gradients that are small (biases, affine maps) are taken side by side, as if they were one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from psgrad.capture.contribution import Contribution, KeptGrads, PerParameter
from psgrad.conv.reused import Blocks
from psgrad.layers.base import squared_norms
from psgrad.per_sample import accumulate
from psgrad.repeated_use import RepeatedUse, repeated
from psgrad.side_by_side import SideBySide, is_small, side_by_side

__all__ = ["Held", "added_up", "total_norms", "weighted_sums"]


class Held:
    """Contributions, every parameter in one place only."""

    passes = 1
    """How often backward runs for one clipped sum; see `psgrad.within_budget`."""

    def __init__(self) -> None:
        self._blocks = Blocks()
        self.clear()

    def clear(self) -> None:
        """Hold nothing; what was held must not be read any more."""
        self._where: dict[nn.Parameter, Contribution] = {}
        self._sq_norms: PerParameter = {}  # of all but the small
        self._small: list[SideBySide] = []
        self._blocks.take_back()

    def add(self, contribution: Contribution) -> None:
        """Take a contribution. A parameter that was used before has the norm of the sum of its uses."""
        while earlier := self._overlapping(contribution):
            for p in earlier.parameters:
                self._drop(p)
            together = repeated(earlier, contribution)
            if together is not None:
                self._where.update(dict.fromkeys(together.parameters, together))
                return
            # both must be written out to be added up, sample by sample
            contribution = earlier.plus(contribution)
        self._take(contribution)

    def _drop(self, p: nn.Parameter) -> None:
        del self._where[p]
        self._sq_norms.pop(p, None)

    def _take(self, contribution: Contribution) -> None:
        """Hold a contribution, in the form that is best for it, with its norms."""
        with self._blocks.lending():
            contribution = self._form(contribution)
        self._hold(contribution)

    def _form(self, contribution: Contribution) -> Contribution:
        """Return the form that a contribution is held in: the faster one."""
        return contribution.kept()

    def _overlapping(self, contribution: Contribution) -> Contribution | None:
        """Return a held contribution that has a parameter of this one."""
        return next((self._where[p] for p in contribution.parameters if p in self._where), None)

    def _hold(self, contribution: Contribution) -> None:
        self._where.update(dict.fromkeys(contribution.parameters, contribution))
        if isinstance(contribution, KeptGrads):
            large = {p: grad for p, grad in contribution.written.items() if not is_small(grad)}
            self._sq_norms |= {p: squared_norms(grad) for p, grad in large.items()}
        else:
            self._sq_norms |= contribution.sq_norms()

    def settle(self) -> None:
        """Decide how to hold the layers that may have been called once more."""
        for contribution in self._contributions():
            if isinstance(contribution, RepeatedUse):
                self._take(contribution)

    def settled(self) -> list[tuple[Contribution, PerParameter]]:
        """Return what is held with its squared norms by parameter; none is in two contributions."""
        self.settle()
        return [(c, {p: self._sq_norm(p) for p in c.parameters}) for c in self._contributions()]

    def _sq_norm(self, p: nn.Parameter) -> Tensor:
        found = self._sq_norms.get(p)
        return squared_norms(self._written(p)) if found is None else found

    def _contributions(self) -> list[Contribution]:
        """Return what is held, in the order of backward."""
        return list({id(c): c for c in self._where.values()}.values())

    def paths(self) -> dict[str, list[nn.Parameter]]:
        """What each module contributed to, by its path.

        Parameters that several modules share are counted where they were used first in backward.
        """
        found: dict[str, list[nn.Parameter]] = {}
        for p, contribution in self._where.items():
            found.setdefault(contribution.path, []).append(p)
        return found

    def sq_norms(self, groups: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, Tensor]:
        """Squared norms over each group of parameters, float32 at least, once between two releases.

        They are `[N]`, or `[K, N]` of an ensemble. A group of which no parameter contributed is left out.
        """
        self.settle()
        found = {}
        for name, group in groups.items():
            members = [p for p in group if p in self._where]
            small = side_by_side({p: self._written(p) for p in members if p not in self._sq_norms})
            terms = [self._sq_norms[p] for p in members if p in self._sq_norms]
            terms += [beside.sq_norms() for beside in small]
            self._small += small
            if terms:
                found[name] = added_up(terms)
        return found

    def _written(self, p: nn.Parameter) -> Tensor:
        contribution = self._where[p]
        assert isinstance(contribution, KeptGrads)
        return contribution.written[p]

    def release(self, factors: PerParameter) -> None:
        """Add `sum_n factors[p][n] * grads[p][n]` to every parameter's `.grad`, and hold nothing any more.

        To be called after `sq_norms` of all. `factors` is `[N]`, or `[K, N]`, for every parameter; parameters
        that are clipped together share one tensor.
        """
        for p, added in self._weighted_sums(factors).items():
            accumulate(p, added)

    def _weighted_sums(self, factors: PerParameter) -> PerParameter:
        apart = {p for beside in self._small for p in beside.parameters}
        parts: list[Contribution | SideBySide] = [
            *self._small,
            *(_without(apart, contribution) for contribution in self._contributions()),
        ]
        self._where.clear()
        self._small.clear()
        sums: PerParameter = {}
        while parts:  # what a layer held is let go of before the next one's sum is made
            sums |= weighted_sums(parts.pop(), factors)
        self.clear()
        return sums

    def nbytes(self) -> int:
        """Bytes of all that is held, with the copies that `sq_norms` makes of what is small."""
        storages = {}
        copies = 0
        for contribution in self._contributions():
            for t in contribution.tensors():
                storage = t.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            if isinstance(contribution, KeptGrads):
                copies += sum(grad.nbytes for grad in contribution.written.values() if is_small(grad))
        return sum(storages.values()) + copies


def _without(parameters: Collection[nn.Parameter], contribution: Contribution) -> Contribution:
    """Return a contribution without those of its written gradients."""
    if not isinstance(contribution, KeptGrads):
        return contribution
    rest = {p: grad for p, grad in contribution.written.items() if p not in parameters}
    return KeptGrads(contribution.path, rest, contribution.samples)


def weighted_sums(part: Contribution | SideBySide, factors: PerParameter) -> PerParameter:
    """Return `sum_n factors[p][n] * grads[p][n]` of every parameter, `factors` as for `Held.release`."""
    sums = {}
    for shared in {id(f): f for f in map(factors.__getitem__, part.parameters)}.values():
        found = part.weighted_sum(shared)
        sums.update({p: added for p, added in found.items() if factors[p] is shared})
    return sums


def total_norms(sq_norms: Iterable[Tensor]) -> Tensor:
    """Norms from squared norms of the same shape, float64 if one of them is."""
    return added_up(list(sq_norms)).sqrt()


def added_up(terms: list[Tensor]) -> Tensor:
    """Return the sum of squared norms of the same shape, float64 if one of them is, else float32."""
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in terms) else torch.float32
    return torch.stack([n.to(dtype) for n in terms]).sum(0)
