"""Models whose gradients are averaged among processes, by hooks that no captured gradient passes."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psgrad.errors import CaptureError

__all__ = ["refuse_synchronised", "why_synchronised"]


def why_synchronised(module: nn.Module | None) -> str | None:
    """Why gradients of `module` would not be averaged among processes, as it has them be; or None."""
    if not isinstance(module, DistributedDataParallel) or not module.require_backward_grad_sync:
        return None
    if module.process_group.size() == 1:
        return None
    return (
        "DistributedDataParallel averages gradients among processes as autograd adds them up, and psgrad "
        "writes p.grad itself: each process would train on its own. Attach to the module inside of it "
        "(model.module), call that, and average p.grad after backward (torch.distributed.all_reduce)"
    )


def refuse_synchronised() -> None:
    """Raise where a model is called by another that averages gradients among processes.

    Raises
    ------
    CaptureError
        Saying how to average them.

    """
    if (why := why_synchronised(DistributedDataParallel._get_active_ddp_module())) is not None:
        raise CaptureError(why)
