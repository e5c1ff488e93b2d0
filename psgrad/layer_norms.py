"""Every layer's norms of a backward pass, added up when they are asked for.

Most who look at norms look at those over all layers: a few sums for each layer would take longer than those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from psgrad.capture.contribution import PerParameter
from psgrad.held import total_norms
from psgrad.layers.base import squared_norms
from psgrad.side_by_side import SideBySide

__all__ = ["LayerNorms"]


class LayerNorms:
    """Norms by module path.

    Parameters
    ----------
    paths
        Whose parameters each module's are.
    sq_norms
        Squared norms `[N]`, or `[K, N]` of an ensemble, of parameters.
    small
        Gradients of the others.

    """

    def __init__(
        self, paths: Mapping[str, Sequence[nn.Parameter]], sq_norms: PerParameter, small: Sequence[SideBySide]
    ) -> None:
        self._paths, self._sq_norms, self._small = paths, sq_norms, small
        self._value: dict[str, Tensor] | None = None

    def value(self) -> dict[str, Tensor]:
        """Norms `[N]`, or `[K, N]`, by path, float32 at least."""
        if self._value is None:
            sq_norms = dict(self._sq_norms)
            for beside in self._small:
                sq_norms |= {p: squared_norms(grads) for p, grads in beside.grads().items()}
            self._value = {
                path: total_norms([sq_norms[p] for p in parameters])
                for path, parameters in self._paths.items()
            }
            self._sq_norms, self._small = {}, ()
        return self._value
