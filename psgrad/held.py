"""What a backward pass captured, held until every layer's norms are known.

Per layer, one of two things is held: the written-out per-sample gradients, or the layer's input and output
gradient, from which one ordinary weight gradient on the scaled output gradient gives the weighted sum. The
layer's rule says which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.contribution import Contribution, KeptGrads, PerParameter
from psgrad.per_sample import accumulate

__all__ = ["Held", "total_norms"]


class Held:
    """Contributions and their squared norms, every parameter in one place only."""

    def __init__(self) -> None:
        self._contributions: list[Contribution] = []
        self._sq_norms: list[PerParameter] = []

    def add(self, contribution: Contribution) -> None:
        """Take a contribution. A parameter that was used before has the norm of the sum of its uses."""
        parameters = set(contribution.parameters)
        for i in reversed(range(len(self._contributions))):
            if parameters & set(self._contributions[i].parameters):
                # both must be written out to be added up, sample by sample
                earlier, _ = self._contributions.pop(i), self._sq_norms.pop(i)
                contribution = KeptGrads(earlier.path, earlier.grads(), earlier.samples) + contribution
        held = contribution.kept()
        self._contributions.append(held)
        self._sq_norms.append(held.sq_norms())

    def per_layer(self) -> dict[str, Tensor]:
        """Norms `[N]` of what each module contributed, by its path; float32 at least.

        Parameters that several modules share are counted where they were used first in backward.
        """
        sums: dict[str, Tensor] = {}
        for contribution, sq_norms in zip(self._contributions, self._sq_norms, strict=True):
            for sq_norm in sq_norms.values():
                path = contribution.path
                sums[path] = sums[path] + sq_norm if path in sums else sq_norm
        return {path: total.sqrt() for path, total in sums.items()}

    def release(self, factors: Tensor | None) -> None:
        """Add `sum_n factors[n] * grads[n]` to every parameter's `.grad`, and hold nothing any more.

        Without factors it is the plain sum, also of what is not finite.
        """
        contributions = self._contributions
        self.clear()
        for contribution in contributions:
            if factors is None:
                factors = torch.ones(contribution.samples, device=contribution.parameters[0].device)
            for p, total in contribution.weighted_sum(factors).items():
                accumulate(p, total)

    def clear(self) -> None:
        """Hold nothing."""
        self._contributions, self._sq_norms = [], []


def total_norms(per_layer: dict[str, Tensor]) -> Tensor:
    """Norms `[N]` over all layers, float64 if one of them is."""
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in per_layer.values()) else torch.float32
    return torch.stack([n.to(dtype).square() for n in per_layer.values()]).sum(0).sqrt()
