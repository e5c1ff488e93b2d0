"""Torch's fused kernels over stacked parameters: when they fit, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_

from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = ["FusedFit", "changed_by_fused"]


class FusedFit:
    """Whether torch's fused optimizers take the tensors of a group: of one dtype, on one device, contiguous.

    On the CPU they read each tensor's memory from its first element on, whatever its strides are.
    Parameters and state are looked at again only where they are other tensors than the last time, or
    parameters lie elsewhere: with a small model, looking takes as long as the update.

    Parameters
    ----------
    devices
        Types of device that will do.

    """

    def __init__(self, *devices: str) -> None:
        self._devices = devices
        self._seen: list[Tensor] = []
        self._places: list[int] = []
        self._fit = False

    def __call__(
        self, parameters: Sequence[Tensor], grads: Sequence[Tensor], *states: Sequence[Tensor]
    ) -> bool:
        """Look at parameters `[K, ...]`, their gradients, and as many state tensors in lists of their own."""
        tensors = [*parameters, *chain.from_iterable(states)]
        places = list(map(Tensor.data_ptr, parameters))  # which `Ensemble.keep` changes
        known = places == self._places and len(tensors) == len(self._seen)
        if not known or not all(map(is_, tensors, self._seen)):
            self._seen, self._places, self._fit = tensors, places, self._look(tensors)
        dtype = tensors[0].dtype
        return (
            self._fit
            and all(map(Tensor.is_contiguous, grads))
            and not [grad for grad in grads if grad.dtype is not dtype]
        )

    def _look(self, tensors: Sequence[Tensor]) -> bool:
        dtype, device = tensors[0].dtype, tensors[0].device
        if device.type not in self._devices or not dtype.is_floating_point:
            return False
        return all(t.is_contiguous() and t.dtype is dtype and t.device == device for t in tensors)


def changed_by_fused(*changed: Sequence[Tensor]) -> None:
    """Tell autograd that a fused kernel changed these, which torch's own optimizers leave out.

    Then `backward` through a graph that needs the old values is an error, and not wrong in silence.
    """
    increment_version([t for tensors in changed for t in tensors])
