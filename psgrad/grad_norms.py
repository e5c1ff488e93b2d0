"""`GradNorms`: every sample's gradient norm, beside the ordinary gradient."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from psgrad.added_norm import AddedNorm
from psgrad.capture import attach
from psgrad.capture.contribution import Contribution
from psgrad.errors import ConfigError
from psgrad.held import total_norms
from psgrad.layer_norms import LayerNorms
from psgrad.loss import LossCheck, LossReduction, checked_reduction
from psgrad.norm_statistics import NoiseScale, noise_scale, outliers
from psgrad.plain_sums import PlainSums

__all__ = ["GradNorms"]


@dataclass(frozen=True)
class _Seen:
    """What one backward pass showed."""

    norms: Tensor
    of_layers: LayerNorms
    scale: int
    """Of layers' norms, to be those of a sample's own loss."""
    squared_norm_of_sum: AddedNorm
    divisor: int
    """Of the sum that landed in `.grad`, to be a mean over samples."""


class GradNorms:
    """After each `loss.backward()`, `.norms` holds every sample's gradient norm; `p.grad` is ordinary.

    Parameters
    ----------
    module
        The model, or a `psgrad.ensemble.Ensemble`: then every norm is of a member and a sample, `[K, N]`,
        as if member k were alone, under the sum of the members' losses.
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
    ConfigError
        In `backward`, where the loss's graph shows that it is not the `loss_reduction` that was said.

    Warns
    -----
    UserWarning
        Once, where a mean divides by class weights or by the number of targets that are not ignored; and once
        where the first batch shows that the loss mixes samples.

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
        self._held = PlainSums()
        self._seen: _Seen | None = None
        check = LossCheck(self._reduction, samples_must_not_mix=False)
        self._capture = attach(module, self, rows_per_sample, check)

    @property
    def _last(self) -> _Seen:
        if self._seen is None:
            raise ConfigError("no backward pass has been seen yet")
        return self._seen

    @property
    def per_layer(self) -> dict[str, Tensor]:
        """Norms `[N]`, or `[K, N]`, by module path over its parameters, of the last backward pass.

        Raises
        ------
        ConfigError
            If there was none.

        """
        seen = self._last
        return {path: norms * seen.scale for path, norms in seen.of_layers.value().items()}

    @property
    def norms(self) -> Tensor:
        """Norms `[N]`, or `[K, N]`, over all trainable parameters, of the last backward pass.

        Errors are those of `per_layer`.
        """
        return self._last.norms

    @property
    def noise_scale(self) -> NoiseScale:
        """How noisy a sample's gradient is, of the last backward pass (McCandlish et al. 2018).

        Of an ensemble, `[K]`: every member's.

        Raises
        ------
        ConfigError
            If there was none, or it had fewer than two samples; or if `p.grad` has been changed since, or set
            to None: it is computed from there, when it is asked for.

        """
        seen = self._last
        return noise_scale(seen.norms, seen.squared_norm_of_sum.value() / seen.divisor**2)

    def outliers(self, factor: float = 3.5, *, member: int | None = None) -> Tensor:
        """Return the samples of the last backward pass with unusually large norms.

        Parameters
        ----------
        factor
            A norm is an outlier above `median + factor * 1.4826 MAD`, MAD the median absolute deviation:
            robust to up to half of the samples (Iglewicz and Hoaglin 1993, who use 3.5).
        member
            Whose samples, of an ensemble.

        Returns
        -------
        Tensor
            Indices `[k]`, int64, the largest norm first; samples whose gradient is not finite before all.

        Raises
        ------
        ConfigError
            If there was no backward pass, the factor is negative, or no member is named of an ensemble, or
            one that does not exist.

        """
        norms = self.norms
        if norms.ndim == 1:
            if member is not None:
                raise ConfigError(f"member={member} is for an ensemble, and this is one model")
            return outliers(norms, factor)
        if member is None or not 0 <= member < len(norms):
            raise ConfigError(
                f"outliers are those of one member: give member=0 to {len(norms) - 1}, got {member}"
            )
        return outliers(norms[member], factor)

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
        self._held.add(contribution)

    def finish(self, samples: int) -> None:
        """Publish the norms; part of `backward`."""
        mean = self._reduction == "mean"
        scale = samples if mean else 1
        norms = total_norms(self._held.sq_norms({"": self._capture.trainable.values()}).values()) * scale
        of_layers = self._held.layer_norms()
        squared_norm = self._held.release_all(norms)
        self._seen = _Seen(norms, of_layers, scale, squared_norm, 1 if mean else max(1, samples))

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
