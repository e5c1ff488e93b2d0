"""What a weighted sum asks about the factors of its samples, looked up once."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import Tensor

__all__ = ["are_ones", "forget", "remove_some"]


@dataclass(frozen=True)
class _Known:
    factors: weakref.ref[Tensor]
    version: int
    ones: bool
    some_zero: bool


class _Last(threading.local):
    known: _Known | None = None


_last = _Last()


def are_ones(factors: Tensor) -> bool:
    """Whether every factor is 1. On CUDA nobody looks, which would make the host wait: False."""
    return not factors.is_cuda and _look(factors).ones


def remove_some(factors: Tensor) -> bool:
    """Whether a factor may be 0, which removes its sample. On CUDA nobody looks: True."""
    return factors.is_cuda or _look(factors).some_zero


def forget() -> None:
    """Look anew at whatever comes next: not every change of values leaves a trace (NumPy's, `.data`)."""
    _last.known = None


def _look(factors: Tensor) -> _Known:
    if factors.is_inference():  # which counts no versions
        return _found(factors)
    known = _last.known
    if known is None or known.factors() is not factors or known.version != factors._version:
        known = _last.known = _found(factors)
    return known


def _found(factors: Tensor) -> _Known:
    at = weakref.ref(factors), 0 if factors.is_inference() else factors._version
    if not factors.numel():
        return _Known(*at, ones=True, some_zero=False)
    low, high = (float(end) for end in factors.aminmax())
    return _Known(*at, ones=low == high == 1, some_zero=not low > 0 and not bool(factors.all()))
