"""`PrivateOptimizer`: clipped sums in, noise, a constant divisor, one accounted step out."""

from __future__ import annotations

from typing import Any

import torch
from opacus.accountants.accountant import IAccountant

from psgrad.clipping import ClipPerSample
from psgrad.dp.noise import add_gaussian_noise, noise_generator
from psgrad.errors import ConfigError

__all__ = ["PrivateOptimizer"]


class PrivateOptimizer:
    """One logical step of DP-SGD (Abadi et al. 2016) around any `torch.optim` optimizer.

    Parameters
    ----------
    optimizer
        Over trainable parameters of the module that `clip` is attached to, and no others.
    clip
        From `clip_per_sample(module, max_norm, "sum")`. Several backward passes may come before a step:
        their clipped sums add up.
    noise_multiplier
        Standard deviation of the noise in units of the clipping norm.
    expected_batch_size
        What the noisy sum is divided by: q times the number of samples, a constant. The size of the
        batch that was drawn is private and never used.
    accountant
        Is told of every step.
    sample_rate
        q, for the accountant.
    generator
        For the noise; None to make one with `noise_generator`.

    Guarantees
    ----------
    Each `step()` draws noise once for every trainable parameter, used or not, and records one step with
    the accountant before the weights move. A step without any backward pass (an empty batch) is noise
    only and accounted like every other. No step moves a parameter whose gradient was not clipped.

    Raises
    ------
    ConfigError
        If the clip handle does not sum, a number is out of range, or the optimizer holds other
        parameters than those that are clipped.

    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip: ClipPerSample,
        *,
        noise_multiplier: float,
        expected_batch_size: float,
        accountant: IAccountant,
        sample_rate: float,
        generator: torch.Generator | None = None,
    ) -> None:
        if clip.loss_reduction != "sum":
            raise ConfigError('private steps add up clipped sums: clip with loss_reduction="sum"')
        if not expected_batch_size > 0:
            raise ConfigError(f"expected_batch_size must be positive, got {expected_batch_size}")
        if not noise_multiplier >= 0:
            raise ConfigError(f"noise_multiplier must be 0 or more, got {noise_multiplier}")
        self.parameters = list(clip.trainable.values())
        held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if strangers := held - set(self.parameters):
            shapes = sorted(str(tuple(p.shape)) for p in strangers)
            raise ConfigError(
                f"the optimizer holds {len(strangers)} parameters that are not clipped, "
                f"of shapes {', '.join(shapes)}"
            )
        self.optimizer = optimizer
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.accountant = accountant
        self.sample_rate = sample_rate
        self.generator = generator or noise_generator(self.parameters[0].device)

    def step(self) -> None:
        """Make the noisy step that the gradients in `.grad` call for, and clear them."""
        sigma = self.clip.style.gradient_noise_multiplier(self.noise_multiplier)
        gathered = self.clip.take(self.generator)
        add_gaussian_noise(self.parameters, sigma, gathered.l2_bound, self.generator)
        for p in self.parameters:
            assert p.grad is not None
            p.grad /= self.expected_batch_size
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients gathered since the last step."""
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, but the noise generator: noise is never drawn twice."""
        return {"optimizer": self.optimizer.state_dict(), "accountant": self.accountant.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises
        ------
        ConfigError
            If the state has no accountant: epsilon would start from zero.

        """
        if not state.get("accountant"):
            raise ConfigError("this state has no accountant: the privacy spent so far would be forgotten")
        self.accountant.load_state_dict(state["accountant"])
        self.optimizer.load_state_dict(state["optimizer"])
