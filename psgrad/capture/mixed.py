"""Whether a model mixes samples: one's result, or a layer's row, moves when another is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture.trial import Layout, picked, without_trace
from psgrad.errors import ConfigError, RefusedModelError
from psgrad.independence import Call, why_mixed
from psgrad.tensors_in import tensors_in

__all__ = ["Batch", "refuse_mixed"]

Run = Callable[[Any, Any, int, tuple[int, ...]], tuple[Any, list[tuple[str, Tensor]]]]
"""Runs the whole model on args and kwargs of so many rows, which are of these samples; tells what else has
the batch in axis 0, and what it says if one sample's rows there depend on another's."""


@dataclass(frozen=True)
class Batch:
    """What a model is called with.

    Attributes
    ----------
    call
        Its args and kwargs.
    rows
        N K, N > 1.
    rows_per_sample
        K.
    layout
        Where its tensors have the batch.

    """

    call: Call
    rows: int
    rows_per_sample: int
    layout: Layout

    def of(self, samples: tuple[int, ...]) -> Call:
        """Return the call with these samples."""
        some = [n * self.rows_per_sample + k for n in samples for k in range(self.rows_per_sample)]
        return picked(self.call, self.rows, some, self.layout)

    @property
    def others(self) -> tuple[int, int]:
        """What is exchanged for sample 0, and what for sample 1."""
        return (2, 2) if self.rows > 2 * self.rows_per_sample else (1, 0)


def refuse_mixed(module: nn.Module, run: Run, batch: Batch, of_samples: Callable[[int], bool]) -> None:
    """Raise if a result of the model for one sample depends on another sample, or a layer's row does.

    Only real samples are tried, three at most, in five runs of two; only what has the batch in axis 0 is
    looked at. With a sample, its copies of parameters are exchanged. A layer's rows may be others than the
    samples' though results are not: where a model sorts its batch, and puts it back. What moves by no more
    than rounding, or also between two runs alike, and what draws random numbers by need (`nn.RReLU`), says
    nothing. `psgrad.check_rows_independent` looks closer.

    Parameters
    ----------
    module
        The model.
    run
        Runs it as it will be run, modules that run one sample at a time included.
    batch
        To take samples of.
    of_samples
        Whether a tensor that it returns, by position, may have the batch in axis 0: a state `[layers, N, ..]`
        is as long with two layers.

    Raises
    ------
    RefusedModelError
        If it does. Names the submodule that mixes, if that is to be found.

    """
    first, second = batch.others
    runs: list[_Results] = []  # the first and the last
    for samples in ((0, 1), (0, 1), (0, second), (first, 1), (first, 0)):
        results = _Results(module, run, batch, samples, of_samples)
        for other in runs:
            if not results.comparable(other):
                return
            places = results.moved(other)
            if places and samples == other.samples:
                return
            if places:
                raise RefusedModelError(_why(module, places, batch))
        runs = [*runs[:1], results]


RESULT = ""
"""In place of what is said of something inside of the model."""


class _Results:
    """What one run returned with the batch in axis 0, what was taken for it, and the random numbers left."""

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        batch: Batch,
        samples: tuple[int, int],
        of_samples: Callable[[int], bool],
    ) -> None:
        self.samples = samples
        two = 2 * batch.rows_per_sample
        with without_trace(module):
            out, taken = run(*batch.of(samples), two, samples)
            self._random = torch.get_rng_state()
        results = tensors_in(out)
        found = [(RESULT, t) for i, t in enumerate(results) if of_samples(i)]
        tensors = [(where, t.detach()) for where, t in found + taken if t.shape[:1] == (two,)]
        self._tensors = [(where, t.unflatten(0, (2, batch.rows_per_sample))) for where, t in tensors]

    def comparable(self, other: _Results) -> bool:
        """Whether both drew as many random numbers, and returned and took the same shapes."""
        shapes = ([(where, t.shape) for where, t in results._tensors] for results in (self, other))
        return torch.equal(self._random, other._random) and len({str(found) for found in shapes}) == 1

    def moved(self, other: _Results) -> list[str]:
        """Where a sample that both have in the same place differs by more than rounding, results first."""
        same = [n for n in range(2) if self.samples[n] == other.samples[n]]
        pairs = zip(self._tensors, other._tensors, strict=True)
        return [where for (where, a), (_, b) in pairs if any(_differ(a[n], b[n]) for n in same)]


def _differ(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return not torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max()) if a.numel() else 0.0
    tolerance = torch.finfo(a.dtype).eps ** 0.75 * scale
    return not torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _why(module: nn.Module, places: list[str], batch: Batch) -> str:
    """Name the submodule that mixes, if it is to be found; or where rows are others than the samples'."""
    if places[0] != RESULT:
        return places[0]
    first, second = batch.others
    runs = [
        (torch.tensor(changed, device="cpu"), batch.of(samples))
        for changed, samples in (
            ((False, False), (0, 1)),
            ((False, True), (0, second)),
            ((True, False), (first, 1)),
        )
    ]
    try:
        why = why_mixed(module, runs, list(module.buffers()))
    except ConfigError:
        why = None
    return (
        why
        or next(filter(None, places), None)
        or f"{type(module).__name__} mixes samples: one's output moved when another was exchanged. Compute "
        "over other axes than the batch (axis 0), normalise with GroupNorm or LayerNorm, or use its eval() "
        "mode; psgrad.check_rows_independent(model, inputs) looks for the submodule."
    )
