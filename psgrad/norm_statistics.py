"""What per-sample gradient norms tell: how noisy a gradient is, and which samples stand out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from psgrad.errors import ConfigError

__all__ = ["NoiseScale", "noise_scale", "outliers"]


@dataclass(frozen=True)
class NoiseScale:
    """Gradient noise of one batch, from McCandlish et al. (2018), appendix A.1 with B_small = 1, B_big = N.

    Attributes
    ----------
    trace
        Scalar, or `[K]`, an unbiased estimate of tr(Sigma), the summed variance of a sample's gradient.
    squared_norm
        As `trace`, an unbiased estimate of `|G|^2`, G the expected gradient; under 0 where noise drowns it.

    Average both over steps before dividing: the ratio of two unbiased estimates is biased.

    """

    trace: Tensor
    squared_norm: Tensor

    @property
    def simple(self) -> Tensor:
        """B_simple = tr(Sigma) / |G|^2, the batch size beyond which larger batches stop helping much."""
        return self.trace / self.squared_norm

    def __add__(self, other: NoiseScale) -> NoiseScale:
        """Add up estimates, whose `simple` is then that of their average."""
        return NoiseScale(self.trace + other.trace, self.squared_norm + other.squared_norm)


def noise_scale(norms: Tensor, squared_norm_of_mean: Tensor) -> NoiseScale:
    """Estimate tr(Sigma) and |G|^2 from one batch.

    With m = mean_n |g_n|^2 and M = |mean_n g_n|^2, `E m = |G|^2 + tr(Sigma)` and
    `E M = |G|^2 + tr(Sigma) / N`; solved for both.

    Parameters
    ----------
    norms
        `[N]`, or `[K, N]` of K models, N at least 2; what is not finite makes the estimates so.
    squared_norm_of_mean
        Scalar, or `[K]`, M.

    Raises
    ------
    ConfigError
        If N is under 2.

    """
    samples = norms.shape[-1]
    if samples < 2:
        raise ConfigError(f"the noise of a gradient shows from two samples on, the batch had {samples}")
    mean_of_squares = norms.square().mean(-1)
    trace = (mean_of_squares - squared_norm_of_mean) * samples / (samples - 1)
    return NoiseScale(trace, mean_of_squares - trace)


def outliers(norms: Tensor, factor: float) -> Tensor:
    """Return the indices of norms `[N]` above `median + factor * 1.4826 MAD`, the largest first.

    Norms that are not finite come before all, and count for neither median nor MAD.

    Raises
    ------
    ConfigError
        If the factor is negative.

    """
    if not factor >= 0:
        raise ConfigError(f"factor must be 0 or more, got {factor}")
    finite = norms.isfinite()
    size = norms.where(finite, norms.new_tensor(float("inf")))
    median = norms[finite].median()  # NaN, of which nothing is more, where no norm is finite
    deviation = 1.4826 * (norms[finite] - median).abs().median()
    out = ~finite | (size > median + factor * deviation)
    order = size.argsort(descending=True, stable=True)
    return order[out[order]]
