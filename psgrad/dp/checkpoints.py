"""Checkpoints of Opacus, as psgrad's engine reads them."""

from __future__ import annotations

from typing import Any

from torch import nn

from psgrad.dp.optimizer import PrivateOptimizer

__all__ = ["from_opacus"]

WRAPPED = "_module."
"""What `opacus.GradSampleModule` puts before the names of the module inside of it."""


def from_opacus(
    checkpoint: dict[str, Any], module: nn.Module, optimizer: PrivateOptimizer | None
) -> dict[str, Any]:
    """Translate what `opacus.PrivacyEngine.save_checkpoint` wrote; psgrad's own is returned as it is.

    Parameters
    ----------
    checkpoint
        As it was read.
    module
        To be loaded: its names decide whether those of the checkpoint lose their "_module.".
    optimizer
        To be loaded. Opacus writes the state of the optimizer inside only: the privacy spent is the
        checkpoint's, and the clipping bound is the one that the optimizer was made with, as in Opacus.

    """
    translated = dict(checkpoint)
    parameters = checkpoint.get("module_state_dict", {})
    own = any(name.startswith(WRAPPED) for name in module.state_dict())
    if parameters and not own and all(name.startswith(WRAPPED) for name in parameters):
        translated["module_state_dict"] = {
            name.removeprefix(WRAPPED): value for name, value in parameters.items()
        }
    state = checkpoint.get("optimizer_state_dict")
    if optimizer is not None and state is not None and not {"accountant", "clip"} & set(state):
        translated["optimizer_state_dict"] = {
            **state,
            "accountant": checkpoint.get("privacy_accountant_state_dict"),
            "clip": optimizer.clip.state_dict(),
        }
    return translated
