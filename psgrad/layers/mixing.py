"""Layers that make one sample's output depend on another sample."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["why_samples_mix"]

ALONG_AN_AXIS = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.GLU, nn.CosineSimilarity)
"""Layers that put everything along their `dim` together."""


def why_samples_mix(module: nn.Module) -> str | None:
    """Why this module, in its present mode, makes rows of a batch depend on each other, and what to do.

    Returns
    -------
    str | None
        None if no listed type of layer is the matter. Only the module itself is looked at, not its
        children.

    """
    if isinstance(module, _InstanceNorm):
        if module.training and module.track_running_stats:
            return "updates running statistics from the whole batch; use track_running_stats=False"
        return None
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        of_torch = type(module).__module__.startswith("torch.")
        replaces = "replaces it" if of_torch else "replaces torch's layers and timm's"
        return (
            "normalises each sample with the statistics of the whole batch; use GroupNorm "
            f"(psgrad.dp.PrivacyEngine.get_compatible_module {replaces}), or keep the layer in eval() mode"
        )
    if isinstance(module, ALONG_AN_AXIS) and module.dim == 0:
        return "works along axis 0, the batch; use another dim, or the function where axis 0 is no batch"
    return None
