"""Torch's fused kernels over stacked parameters: when they fit, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = ["changed_by_fused", "fits_fused"]


def fits_fused(devices: Sequence[str], parameters: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether torch's fused optimizers take these: of one dtype, on one device, contiguous.

    On the CPU they read each tensor's memory from its first element on, whatever its strides are.

    Parameters
    ----------
    devices
        Types of device that will do.
    parameters, *others
        Parameters `[K, ...]`, and as many gradients and state tensors in lists of their own.

    """
    dtype, device = parameters[0].dtype, parameters[0].device
    if device.type not in devices or not dtype.is_floating_point:
        return False
    for tensors in (parameters, *others):
        for t in tensors:
            if not t.is_contiguous() or t.dtype is not dtype or t.device != device:
                return False
    return True


def changed_by_fused(*changed: Sequence[Tensor]) -> None:
    """Tell autograd that a fused kernel changed these, which torch's own optimizers leave out.

    Then `backward` through a graph that needs the old values is an error, and not wrong in silence.
    """
    increment_version([t for tensors in changed for t in tensors])
