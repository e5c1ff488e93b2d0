"""`PerSampleGrads`: every parameter's gradient for every sample, after an ordinary `backward`."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from psgrad.capture import attach
from psgrad.capture.contribution import Contribution
from psgrad.loss import LossCheck, LossReduction, checked_reduction

__all__ = ["PerSampleGrads", "accumulate"]


class PerSampleGrads:
    """After each `loss.backward()`, `p.grad_sample` holds the gradient of every sample.

    Parameters
    ----------
    module
        The model, or a `psgrad.ensemble.Ensemble`. While attached, `backward` does not add up parameter
        gradients itself.
    loss_reduction
        How the loss combines the batch, "mean" or "sum" over samples. Under "mean" the 1/N is undone:
        `p.grad_sample[n]` is the gradient of sample n's own loss.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample. Under "mean" a sample's own loss is
        the mean over its rows, under "sum" their sum.

    Guarantees
    ----------
    For every trainable parameter that the loss depends on, when `backward` returns:

    - `p.grad_sample` is `[N, *p.shape]`, of p's dtype; an empty batch gives `[0, *p.shape]`. It is that
      of the last backward pass alone and is never added to; None where the loss does not depend on p.
      Of an ensemble it is `[K, N, *shape]` for a stacked parameter `[K, *shape]`: member k's, as if it were
      alone, under the sum of the members' losses.
    - `p.grad` has grown by the ordinary gradient, as without psgrad.

    A parameter used where it cannot be captured raises `CaptureError`, by name.

    Raises
    ------
    RefusedModelError
        If the model mixes samples, has nothing to train, or has a layer without per-sample gradients.
    ConfigError
        In `backward`, where the loss's graph shows that it is not the `loss_reduction` that was said.

    Warns
    -----
    UserWarning
        Once, where a mean divides by class weights or by the number of targets that are not ignored; and once
        where the first batch shows that the loss mixes samples.

    Examples
    --------
    >>> handle = PerSampleGrads(model)                      # doctest: +SKIP
    >>> criterion(model(x), y).backward()                   # doctest: +SKIP
    >>> norms = sum(p.grad_sample.flatten(1).square().sum(1) for p in model.parameters())  # doctest: +SKIP
    >>> handle.remove()                                     # doctest: +SKIP

    """

    def __init__(
        self, module: nn.Module, loss_reduction: LossReduction = "mean", *, rows_per_sample: int = 1
    ) -> None:
        self._reduction = checked_reduction(loss_reduction)
        self._pending: dict[nn.Parameter, Tensor] = {}
        check = LossCheck(self._reduction, samples_must_not_mix=False)
        self._capture = attach(module, self, rows_per_sample, check)

    @property
    def regions(self) -> dict[str, str]:
        """By path, the modules that run one sample at a time, under `torch.vmap`, which costs time, and why.

        They use parameters of their own in a way that is not known to keep samples apart. The first batch
        tells; before, these are all that might. Of an ensemble none: its `plan` says what runs how.
        """
        return self._capture.regions

    once = False
    """See `psgrad.capture.Consumer`."""

    def add(self, contribution: Contribution) -> None:
        """Take one layer's contribution; part of `backward`."""
        for p, grads in contribution.grads().items():
            self._pending[p] = self._pending[p] + grads if p in self._pending else grads

    def finish(self, samples: int) -> None:
        """Publish the results; part of `backward`."""
        for p in self._capture.trainable.values():
            grads = self._pending.pop(p, None)
            if grads is None:
                p.grad_sample = None  # type: ignore[attr-defined]  # the documented result
                continue
            grads = grads.to(p.dtype)
            accumulate(p, grads.sum(self._capture.sample_axis))
            own = grads * samples if self._reduction == "mean" else grads
            p.grad_sample = own  # type: ignore[attr-defined]  # the documented result

    def abandon(self) -> None:
        """Drop what an unfinished backward pass left."""
        self._pending.clear()

    def remove(self) -> None:
        """Detach from the module. The last `p.grad_sample` stays."""
        self._capture.remove()

    def __enter__(self) -> PerSampleGrads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def accumulate(p: nn.Parameter, grad: Tensor) -> None:
    """`p.grad += grad`, as `backward` does: in the dtype of p, and laid out in memory as p is."""
    if p.grad is not None:
        p.grad.add_(grad)  # in place, as autograd does: it may be a view of a buffer of all gradients
    elif grad.dtype == p.dtype and grad.stride() == p.stride():
        p.grad = grad
    else:
        p.grad = torch.empty_like(p.detach()).copy_(grad)
