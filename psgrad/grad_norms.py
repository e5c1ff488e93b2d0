"""`GradNorms`: every sample's gradient norm, beside the ordinary gradient."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn

from psgrad.capture import Capture
from psgrad.contribution import Contribution
from psgrad.errors import ConfigError
from psgrad.held import Held, total_norms
from psgrad.per_sample import LossReduction, checked_reduction

__all__ = ["GradNorms"]


class GradNorms:
    """After each `loss.backward()`, `.norms` holds every sample's gradient norm; `p.grad` is ordinary.

    Parameters
    ----------
    module
        The model.
    loss_reduction
        How the loss combines the batch, "mean" or "sum". Norms are always those of a sample's own loss.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample.

    Guarantees
    ----------
    A parameter that is used several times counts with the norm of the sum of its uses. A sample whose
    gradient is not finite has a norm that is not, and `p.grad` is then what it is without psgrad.

    Raises
    ------
    RefusedModelError
        If the model mixes samples, has nothing to train, or has a layer without per-sample gradients.

    Examples
    --------
    >>> with GradNorms(model) as monitor:                   # doctest: +SKIP
    ...     criterion(model(x), y).backward()
    >>> monitor.norms.topk(5).indices                       # the samples that pull hardest  # doctest: +SKIP

    """

    def __init__(
        self, module: nn.Module, loss_reduction: LossReduction = "mean", *, rows_per_sample: int = 1
    ) -> None:
        self._reduction = checked_reduction(loss_reduction)
        self._held = Held()
        self._squared_sum: Tensor | None = None
        self._per_layer: dict[str, Tensor] | None = None
        self._capture = Capture(module, self, rows_per_sample)

    @property
    def per_layer(self) -> dict[str, Tensor]:
        """Norms `[N]` over the parameters of each module, by module path, of the last backward pass.

        Raises
        ------
        ConfigError
            If there was none.

        """
        if self._per_layer is None:
            raise ConfigError("no backward pass has been seen yet")
        return self._per_layer

    @property
    def norms(self) -> Tensor:
        """Norms `[N]` over all trainable parameters, of the last backward pass; errors as `per_layer`."""
        return total_norms(norms.square() for norms in self.per_layer.values())

    def add(self, contribution: Contribution) -> None:
        """Take one layer's contribution; part of `backward`."""
        self._held.add(contribution)

    def finish(self, samples: int) -> None:
        """Publish the norms; part of `backward`."""
        scale = samples if self._reduction == "mean" else 1
        self._per_layer = {path: norms * scale for path, norms in self._held.per_layer().items()}
        self._squared_sum = self._held.release_all() / (
            1 if self._reduction == "mean" else max(1, samples) ** 2
        )

    def abandon(self) -> None:
        """Drop what an unfinished backward pass left."""
        self._held.clear()

    def remove(self) -> None:
        """Detach from the module. The last norms stay."""
        self._capture.remove()

    def __enter__(self) -> GradNorms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
