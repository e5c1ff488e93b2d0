"""What Opacus's optimizer has and a private one has not, with what to ask for instead."""

from __future__ import annotations

__all__ = ["INSTEAD"]

_IN_STEP = "step() does all of it at once, and accounts for it; attach_step_hook() sees the noisy gradients"

INSTEAD = {
    "grad_samples": "they are not written out; psgrad.PerSampleGrads(model) has them in p.grad_sample",
    "clip_and_accumulate": "loss.backward() does it: p.grad is the clipped sum",
    "add_noise": _IN_STEP,
    "scale_grad": _IN_STEP,
    "pre_step": _IN_STEP,
    "step_hook": "attach_step_hook() adds one, and the accountant is told without any",
    "virtual_step": "signal_skip_step() before step(), or Opacus's BatchMemoryManager",
    "secure_mode": "there is none; see psgrad.dp.noise_generator",
}
"""By name."""
