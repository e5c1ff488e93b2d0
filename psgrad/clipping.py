"""`clip_per_sample`: after an ordinary `backward`, `p.grad` holds the sum of clipped gradients.

Flat clipping needs every layer's norm before any weighted sum; `psgrad.held` holds the layers in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from psgrad.capture import Capture
from psgrad.contribution import Contribution
from psgrad.errors import ConfigError
from psgrad.held import Held, total_norms
from psgrad.per_sample import LossReduction, checked_reduction

__all__ = ["ClipPerSample", "ClipResult", "clip_factors", "clip_per_sample"]


@dataclass(frozen=True)
class ClipResult:
    """What one backward pass clipped.

    Attributes
    ----------
    norms
        `[N]` norms of the samples' own gradients before clipping, over all trainable parameters.
    factors
        `[N]` what each was multiplied by; 0 for a gradient that is not finite.
    l2_bound
        The most that one sample can change the clipped *sum* by, in L2 norm: what noise is scaled to.

    """

    norms: Tensor
    factors: Tensor
    l2_bound: float

    @property
    def clipped(self) -> Tensor:
        """`[N]` bool: the samples whose gradient was longer than allowed, or not finite."""
        return self.factors < 1

    @property
    def non_finite(self) -> Tensor:
        """`[N]` bool: the samples that were left out because their gradient is not finite."""
        return ~self.norms.isfinite()


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """Return `min(1, max_norm / norm)` per sample, and 0 where the norm is not finite.

    Parameters
    ----------
    norms
        `[N]`.
    max_norm
        C > 0; inf asks for factors of 1.

    Guarantees
    ----------
    `factors * norms <= C (1 + 1e-6)`; a norm of 0 has factor 1.

    """
    factors = (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(norms))


class ClipPerSample:
    """The handle that `clip_per_sample` returns: `.result` of the last backward pass, `.remove()`."""

    def __init__(
        self, module: nn.Module, max_norm: float, loss_reduction: LossReduction, rows_per_sample: int
    ) -> None:
        if not max_norm > 0:
            raise ConfigError(f"max_norm must be positive, got {max_norm}")
        self.max_norm = float(max_norm)
        self.loss_reduction = checked_reduction(loss_reduction)
        self._result: ClipResult | None = None
        self._held = Held()
        self._capture = Capture(module, self, rows_per_sample)

    @property
    def result(self) -> ClipResult:
        """Norms and factors of the last backward pass.

        Raises
        ------
        ConfigError
            If there was none.

        """
        if self._result is None:
            raise ConfigError("no backward pass has been clipped yet")
        return self._result

    def add(self, contribution: Contribution) -> None:
        """Take one layer's contribution; part of `backward`."""
        self._held.add(contribution)

    def finish(self, samples: int) -> None:
        """Clip and publish; part of `backward`."""
        # The norm of the sample's own gradient: under "mean", backward saw 1/N of it.
        scale = samples if self.loss_reduction == "mean" else 1
        norms = total_norms(self._held.per_layer()) * scale
        factors = clip_factors(norms, self.max_norm)
        self._held.release(factors)
        self._result = ClipResult(norms, factors, self.max_norm)

    def abandon(self) -> None:
        """Drop what an unfinished backward pass left."""
        self._held.clear()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that are clipped, by path."""
        return self._capture.trainable

    def remove(self) -> None:
        """Detach from the module."""
        self._capture.remove()

    def __enter__(self) -> ClipPerSample:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def clip_per_sample(
    module: nn.Module,
    max_norm: float,
    loss_reduction: LossReduction = "mean",
    *,
    rows_per_sample: int = 1,
) -> ClipPerSample:
    """Clip every sample's gradient during `backward`, for any training loop.

    Parameters
    ----------
    module
        The model.
    max_norm
        C > 0, the largest L2 norm that a sample's gradient over all trainable parameters keeps; a longer
        one is scaled down to it. With inf, `p.grad` is the ordinary gradient.
    loss_reduction
        How the loss combines the batch, "mean" or "sum". Norms are always those of a sample's own loss.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample.

    Returns
    -------
    ClipPerSample
        A handle and context manager: `.result`, `.remove()`.

    Guarantees
    ----------
    When `backward` returns, `p.grad` of every trainable parameter has grown by the clipped sum under
    "sum", by the clipped sum over N under "mean". One sample changes the clipped sum by at most C. A
    sample whose gradient is not finite contributes nothing and is reported in `.result.non_finite`.
    A parameter that is used several times is clipped by the norm of the sum of its uses.

    Raises
    ------
    ConfigError
        If max_norm or loss_reduction is out of range.
    RefusedModelError
        If the model mixes samples, has nothing to train, or has a layer without per-sample gradients.

    """
    return ClipPerSample(module, max_norm, loss_reduction, rows_per_sample)
