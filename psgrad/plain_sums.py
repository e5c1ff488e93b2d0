"""What a backward pass captured, where gradients are added up as they are: nothing waits for a factor.

A layer that can give norms and sum from the same work gives both when backward reaches it. What it was
computed from stays until the end nevertheless: should the layer turn out to be called once more, the norm is
that of the sum of its calls, and is computed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psgrad.added_norm import AddedNorm
from psgrad.capture.contribution import Contribution, PerParameter
from psgrad.held import Held, added_up
from psgrad.layer_norms import LayerNorms
from psgrad.layers.base import squared_norms
from psgrad.per_sample import accumulate
from psgrad.repeated_use import RepeatedUse

__all__ = ["PlainSums"]


class PlainSums(Held):
    """`Held`, for the plain sum."""

    def __init__(self) -> None:
        self._used_again: set[nn.Parameter] = set()
        """Of earlier passes as well: their first use is not computed to be thrown away."""
        super().__init__()

    def clear(self) -> None:
        """See `Held.clear`."""
        super().clear()
        self._sums: PerParameter = {}

    def layer_norms(self) -> LayerNorms:
        """Return norms by path, good also after the release; to be asked for after `sq_norms` of all."""
        return LayerNorms(self.paths(), dict(self._sq_norms), tuple(self._small))

    def release_all(self, norms: Tensor) -> AddedNorm:
        """Add the plain sum to every parameter's `.grad`, also of what is not finite, and hold nothing.

        To be called after `sq_norms` of all.

        Parameters
        ----------
        norms
            `[N]`, or `[K, N]` of an ensemble; of the shape alone is made use.

        Returns
        -------
        AddedNorm
            The squared norm of all that was added, a scalar, or of every member `[K]`.

        """
        sums = self._sums
        for p in sums:
            del self._where[p]
        sums = sums | self._weighted_sums(dict.fromkeys(self._where, torch.ones_like(norms)))
        for p, added in sums.items():
            accumulate(p, added)
        shape = norms.shape[:-1]

        def squared_norm(added: list[Tensor]) -> Tensor:
            return added_up([squared_norms(t if shape else t.unsqueeze(0)) for t in added]).reshape(shape)

        return AddedNorm(sums, squared_norm)

    def _take(self, contribution: Contribution) -> None:
        complete = isinstance(contribution, RepeatedUse) or self._used_again.isdisjoint(
            contribution.parameters
        )
        both = contribution.norms_and_sums() if complete else None
        if both is None:
            super()._take(contribution)
            return
        norms, sums = both
        self._where.update(dict.fromkeys(contribution.parameters, contribution))
        self._sq_norms |= norms
        self._sums |= sums

    def _drop(self, p: nn.Parameter) -> None:
        super()._drop(p)
        self._sums.pop(p, None)
        self._used_again.add(p)
