"""A bound that follows a quantile of the gradient norms, privately."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psgrad.clipping.styles import ClippingStyle, Group, checked_norm
from psgrad.errors import ConfigError

__all__ = ["AdaptiveQuantile"]


@dataclass(frozen=True)
class AdaptiveQuantile(ClippingStyle):
    """Flat clipping whose C follows a quantile of the norms (Andrew et al. 2021, algorithm 1).

    After each logical step `C <- C exp(-learning_rate (b - quantile))`, where b estimates the fraction of
    samples within C: `b = 1/2 + (sum_n (b_n - 1/2) + N(0, count_noise^2)) / expected_batch_size`.

    Sensitivity under add-or-remove-one: C of the clipped sum, with the C of that step; 1/2 of the count.

    The count is released too. Gradients and count together cost what one Gaussian mechanism of noise
    multiplier z costs if the gradients' own is `(z^-2 - (2 count_noise)^-2)^(-1/2)` (theorem 1):
    `gradient_noise_multiplier` gives it, and the accountant is told z. A sample that is not finite counts
    as not within C.

    Attributes
    ----------
    max_norm
        C of the present step; positive and finite.
    expected_batch_size
        Of a logical step; a constant, as the drawn size is private.
    quantile
        Of the norms, the target; from 0 to 1.
    learning_rate
        Of log C; the paper's 0.2.
    count_noise
        Standard deviation of the noise on the count. None stands for the paper's expected_batch_size / 20;
        0 is for training without privacy.

    """

    max_norm: float
    expected_batch_size: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        checked_norm(self.max_norm, finite=True)
        if not 0 < self.expected_batch_size < math.inf:
            raise ConfigError(f"expected_batch_size must be positive, got {self.expected_batch_size}")
        if not 0 <= self.quantile <= 1:
            raise ConfigError(f"quantile must be between 0 and 1, got {self.quantile}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"count_noise must be 0 or more, got {self.count_noise}")

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on the count."""
        return self.expected_batch_size / 20 if self.count_noise is None else self.count_noise

    def groups(self, names: Sequence[str]) -> tuple[Group, ...]:
        """See `ClippingStyle.groups`: one."""
        return (Group("", tuple(names), float(self.max_norm)),)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """See `ClippingStyle.gradient_noise_multiplier`; larger than the total.

        Raises
        ------
        ConfigError
            If the count alone costs more than the total allows.

        """
        if noise_multiplier == 0:
            return 0.0
        if noise_multiplier >= 2 * self.noise:
            raise ConfigError(
                f"a noise multiplier of {noise_multiplier} in total leaves nothing for the gradients: "
                f"count_noise must be above {noise_multiplier / 2}, got {self.noise}"
            )
        return (noise_multiplier**-2 - (2 * self.noise) ** -2) ** -0.5

    def after_step(self, unclipped: Tensor, generator: torch.Generator | None) -> AdaptiveQuantile:
        """See `ClippingStyle.after_step`.

        Raises
        ------
        ConfigError
            If noise is needed and there is no generator for it.

        """
        noise = 0.0
        if self.noise:
            if generator is None:
                raise ConfigError(
                    "the count of unclipped samples needs noise: give take() a generator "
                    "(psgrad.dp.noise_generator), or set count_noise=0 to train without privacy"
                )
            drawn = torch.empty((), dtype=torch.float64, device=generator.device)
            noise = drawn.normal_(0.0, self.noise, generator=generator).item()
        fraction = 0.5 + (unclipped.item() + noise) / self.expected_batch_size
        return replace(
            self, max_norm=self.max_norm * math.exp(-self.learning_rate * (fraction - self.quantile))
        )
