"""A layer that is called several times: its calls become one call with more rows to a sample.

A sample's gradient is the sum over its rows, whichever call they came in. So nothing is written out call by
call, and the norm is that of the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from psgrad.capture.contribution import Contribution, KeptGrads, LayerUse, PerParameter
from psgrad.layers import LayerCall

__all__ = ["RepeatedUse", "repeated"]


@dataclass(frozen=True)
class RepeatedUse(Contribution):
    """Calls of one layer on rows of one shape.

    Attributes
    ----------
    uses
        At least one; not written out.
    written
        The gradients of calls before, if holding those calls would have taken more memory.

    """

    uses: tuple[LayerUse, ...]
    written: KeptGrads | None = None
    path: str = field(init=False)
    samples: int = field(init=False)
    parameters: tuple[torch.nn.Parameter, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("path", "samples", "parameters"):
            object.__setattr__(self, name, getattr(self.uses[0], name))

    def grads(self) -> PerParameter:
        """See `Contribution.grads`."""
        return self._at_once().grads()

    def sq_norms(self) -> PerParameter:
        """See `Contribution.sq_norms`."""
        return self._at_once().sq_norms()

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`."""
        return self._at_once().weighted_sum(factors)

    def norms_and_sums(self) -> tuple[PerParameter, PerParameter] | None:
        """See `Contribution.norms_and_sums`."""
        return self._at_once().norms_and_sums()

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        parts: list[Contribution] = [*self.uses] if self.written is None else [*self.uses, self.written]
        return [t for part in parts for t in part.tensors()]

    def kept(self) -> Contribution:
        """Return one use, or the written gradients; never this form."""
        return self._at_once().kept()

    def and_then(self, use: LayerUse) -> RepeatedUse:
        """Take one more call; the calls so far are written out once they are larger than their gradients."""
        size = self.samples * sum(p.numel() for p in self.parameters)
        if sum(u.call.x.numel() + u.call.g.numel() for u in self.uses) < size:
            return replace(self, uses=(*self.uses, use))
        return RepeatedUse((use,), KeptGrads(self.path, self.grads(), self.samples))

    def _at_once(self) -> Contribution:
        merged = replace(self.uses[0], call=_merged([use.call for use in self.uses]))
        return merged if self.written is None else self.written + merged


def repeated(earlier: Contribution, later: Contribution) -> RepeatedUse | None:
    """Return both as calls of one layer, or None if they are not, or have rows of different shapes."""
    first = earlier.uses[0] if isinstance(earlier, RepeatedUse) else earlier
    if not isinstance(first, LayerUse) or not isinstance(later, LayerUse):
        return None
    if first.call.module is not later.call.module or _rows(first.call) != _rows(later.call):
        return None
    return (earlier if isinstance(earlier, RepeatedUse) else RepeatedUse((first,))).and_then(later)


def _rows(call: LayerCall) -> tuple[object, ...]:
    """What calls must have in common."""
    saved = [t.shape[1:] for t in call.saved]
    return call.x.shape[1:], call.x.dtype, call.g.shape[1:], call.g.dtype, call.wanted, saved


def _merged(calls: list[LayerCall]) -> LayerCall:
    """(N K_1).., (N K_2).., .. -> (N (K_1 + K_2 + ..)).."""
    if len(calls) == 1:
        return calls[0]

    def together(each: Iterable[Tensor]) -> Tensor:
        return torch.cat([call.by_sample(t) for call, t in zip(calls, each, strict=True)], 1).flatten(0, 1)

    return replace(
        calls[0],
        x=together(call.x for call in calls),
        g=together(call.g for call in calls),
        rows_per_sample=sum(call.rows_per_sample for call in calls),
        saved=tuple(map(together, zip(*(call.saved for call in calls), strict=True))),
    )
