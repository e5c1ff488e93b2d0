"""What a backward pass captured, held until every layer's norms are known.

Per layer, one of two things is held: the written-out per-sample gradients, or the layer's input and output
gradient, from which one ordinary weight gradient on the scaled output gradient gives the weighted sum. The
layer's rule says which. Of a layer that is called several times, the calls are held until all are in.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from psgrad.capture.contribution import Contribution, KeptGrads, PerParameter
from psgrad.layers.base import squared_norms
from psgrad.per_sample import accumulate
from psgrad.repeated_use import RepeatedUse, repeated

__all__ = ["Held", "total_norms"]


class Held:
    """Contributions and their squared norms, every parameter in one place only."""

    def __init__(self) -> None:
        self._held: list[tuple[Contribution, PerParameter]] = []
        self._where: dict[nn.Parameter, Contribution] = {}

    def add(self, contribution: Contribution) -> None:
        """Take a contribution. A parameter that was used before has the norm of the sum of its uses."""
        while earlier := self._overlapping(contribution):
            self._held = [entry for entry in self._held if entry[0] is not earlier]
            for p in earlier.parameters:
                del self._where[p]
            together = repeated(earlier, contribution)
            if together is not None:
                self._hold(together, {})
                return
            # both must be written out to be added up, sample by sample
            contribution = KeptGrads(earlier.path, earlier.grads(), earlier.samples) + contribution
        held = contribution.kept()
        self._hold(held, held.sq_norms())

    def _hold(self, contribution: Contribution, sq_norms: PerParameter) -> None:
        self._held.append((contribution, sq_norms))
        self._where.update(dict.fromkeys(contribution.parameters, contribution))

    def _settled(self) -> list[tuple[Contribution, PerParameter]]:
        """Return what is held, with the norms also of layers that may have been called once more."""
        for i, (contribution, _) in enumerate(self._held):
            if isinstance(contribution, RepeatedUse):
                held = contribution.kept()
                self._held[i] = held, held.sq_norms()
                self._where.update(dict.fromkeys(held.parameters, held))
        return self._held

    def _overlapping(self, contribution: Contribution) -> Contribution | None:
        """Return a held contribution that has a parameter of this one."""
        return next((self._where[p] for p in contribution.parameters if p in self._where), None)

    def per_layer(self) -> dict[str, Tensor]:
        """Norms `[N]` of what each module contributed, by its path; float32 at least.

        Parameters that several modules share are counted where they were used first in backward.
        """
        sums: dict[str, Tensor] = {}
        for contribution, sq_norms in self._settled():
            for sq_norm in sq_norms.values():
                path = contribution.path
                sums[path] = sums[path] + sq_norm if path in sums else sq_norm
        return {path: total.sqrt() for path, total in sums.items()}

    def sq_norms(self) -> PerParameter:
        """Squared norms `[N]` of every parameter that contributed; float32 at least."""
        return {p: sq_norm for _, sq_norms in self._settled() for p, sq_norm in sq_norms.items()}

    def release(self, factors: PerParameter) -> None:
        """Add `sum_n factors[p][n] * grads[p][n]` to every parameter's `.grad`, and hold nothing any more.

        `factors` is `[N]` for every parameter; parameters that are clipped together share one tensor.
        """
        held = self._settled()
        self.clear()
        for contribution, _ in held:
            for shared in {id(f): f for f in map(factors.__getitem__, contribution.parameters)}.values():
                for p, added in contribution.weighted_sum(shared).items():
                    if factors[p] is shared:
                        accumulate(p, added)

    def release_all(self) -> Tensor:
        """Add the plain sum to every parameter's `.grad`, also of what is not finite, and hold nothing.

        Returns
        -------
        Tensor
            The squared norm of all that was added, a scalar.

        """
        held = self._settled()
        self.clear()
        norms: list[Tensor] = []
        for contribution, sq_norms in held:
            ones = torch.ones(contribution.samples, device=contribution.parameters[0].device)
            for p, added in contribution.weighted_sum(ones).items():
                accumulate(p, added)
                norms.append(squared_norms(added.reshape(1, -1)).to(sq_norms[p].dtype))
        return torch.cat(norms).sum()

    def clear(self) -> None:
        """Hold nothing."""
        self._held, self._where = [], {}


def total_norms(sq_norms: Iterable[Tensor]) -> Tensor:
    """Norms `[N]` from squared norms `[N]`, float64 if one of them is."""
    each = list(sq_norms)
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in each) else torch.float32
    return torch.stack([n.to(dtype) for n in each]).sum(0).sqrt()
