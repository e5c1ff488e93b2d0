"""The squared norm of gradients that a backward pass added, computed when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from psgrad.errors import ConfigError

__all__ = ["AddedNorm"]


class AddedNorm:
    """Over sums that have become `.grad` as they are, which is not kept alive: of other ones, at once.

    Parameters
    ----------
    sums
        What was added to every parameter's `.grad`.
    compute
        Their squared norm.

    """

    def __init__(
        self, sums: Mapping[nn.Parameter, Tensor], compute: Callable[[list[Tensor]], Tensor]
    ) -> None:
        self._compute = compute
        self._value: Tensor | None = None
        self._seen: list[tuple[TensorWeakRef, int]] = []
        if all(p.grad is added for p, added in sums.items()):
            self._seen = [(TensorWeakRef(added), added._version) for added in sums.values()]
        else:
            self._value = compute(list(sums.values()))

    def value(self) -> Tensor:
        """Return it.

        Raises
        ------
        ConfigError
            If a gradient was written to since, or is gone.

        """
        if self._value is None:
            now = [(ref(), version) for ref, version in self._seen]
            same = [t for t, version in now if t is not None and t._version == version]
            if len(same) < len(now):
                raise ConfigError(
                    "noise_scale is computed from p.grad when it is asked for, and p.grad was changed or set "
                    "to None since backward: ask before zero_grad(), clipping or unscaling"
                )
            self._value = self._compute(same)
            self._seen = []
        return self._value
