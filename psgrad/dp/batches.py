"""Whether the batches of private steps are those that a loader has sampled for them."""

from __future__ import annotations

import warnings

from torch import Tensor

from psgrad.errors import ConfigError

__all__ = ["SampledBatches"]


class SampledBatches:
    """Sizes of a loader's batches whose steps are still to come, one a step.

    Attributes
    ----------
    expected
        Whether a loader was made whose batches the steps are to be on.

    """

    def __init__(self) -> None:
        self.expected = False
        self._sizes: list[int] | None = None  # None before the first pass of the loader
        self._warned = False

    def pass_begins(self) -> None:
        """Forget the batches of a pass that was broken off."""
        self._sizes = []

    def sampled(self, samples: int) -> None:
        """Take in a batch, perhaps ahead of the one that is yielded next."""
        assert self._sizes is not None  # a pass has begun
        self._sizes.append(samples)

    def step_made(self) -> None:
        """One batch less."""
        if self._sizes:
            del self._sizes[0]

    def check(self, gathered: int | Tensor, stacklevel: int) -> None:
        """Look at a step that is to be made with so many samples.

        Parameters
        ----------
        gathered
            How many samples' gradients there are.
        stacklevel
            From here to the caller to warn.

        Raises
        ------
        ConfigError
            If every batch of the loader has had its step.

        Warns
        -----
        UserWarning
            If there are more samples than in any batch; once, if no pass of the loader has begun.

        """
        if self._sizes is None:
            if self.expected and not self._warned:
                self._warned = True
                warnings.warn(OTHER_BATCHES, stacklevel=stacklevel)
            return
        if not self._sizes:
            raise ConfigError(
                "a step on no new batch of the loader: epsilon counts on a batch sampled anew for each step. "
                "Take one step a batch, and iterate over the loader once more for a further pass: "
                "itertools.cycle(loader) and list(loader) keep the batches of the first"
            )
        if gathered > max(self._sizes):  # one may be sampled ahead
            warnings.warn(
                f"a step of {gathered} samples, on a batch of {max(self._sizes)} of the loader. A sample "
                "that went through backward twice (two losses, a second view, windows of a sequence) changes "
                "the sum by twice its bound, to which noise is not scaled: add up its losses and call "
                "backward once, or make its rows one sample by rows_per_sample. Rows from elsewhere do no "
                "harm",
                stacklevel=stacklevel,
            )


OTHER_BATCHES = (
    "this step's batch did not come from the loader that make_private returned, and epsilon holds for "
    "Poisson-sampled batches only: for others get_epsilon reports too little. Iterate over the returned "
    "loader, or pass poisson_sampling=False to make_private"
)
"""Once for an optimizer."""
