"""Whether a model mixes samples: one's result moves when another is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psgrad.capture.trial import without_trace
from psgrad.errors import ConfigError, RefusedModelError
from psgrad.independence import Call, why_mixed

__all__ = ["refuse_mixed"]

Run = Callable[[Any, Any, int], Any]
"""Runs the whole model on args and kwargs of so many rows."""


def refuse_mixed(module: nn.Module, run: Run, call: Call, rows: int, rows_per_sample: int) -> None:
    """Raise if a result of the model for one sample depends on another sample.

    Only real samples are tried, three at most, in four runs of two; only results with the batch in axis 0 are
    looked at. What moves by no more than rounding, or also between two runs alike, and what draws random
    numbers by need (`nn.RReLU`), says nothing. `psgrad.check_rows_independent` looks closer.

    Parameters
    ----------
    module
        The model.
    run
        Runs it as it will be run, modules that run one sample at a time included.
    call
        Its args and kwargs, of N K rows, N > 1.
    rows
        N K.
    rows_per_sample
        K.

    Raises
    ------
    RefusedModelError
        If it does. Names the submodule that mixes, if that is to be found.

    """
    batches = _of_two_samples(call, rows, rows_per_sample)
    first = _Results(module, run, batches[0][1], rows_per_sample)
    for changed, some in batches:  # the first one again: nothing of it is changed
        results = _Results(module, run, some, rows_per_sample)
        if not results.comparable(first):
            return
        if not results.moved(first, [n for n in range(2) if not changed[n]]):
            continue
        if changed.any():
            raise RefusedModelError(_why(module, batches))
        return


def _of_two_samples(call: Call, rows: int, rows_per_sample: int) -> list[tuple[Tensor, Call]]:
    """Make the first two samples, then with either exchanged; and which of them is."""
    others = (2, 2) if rows > 2 * rows_per_sample else (1, 0)
    batches = []
    for changed in ((False, False), (False, True), (True, False)):
        samples = [others[n] if changed[n] else n for n in range(2)]
        picked = [n * rows_per_sample + k for n in samples for k in range(rows_per_sample)]

        def pick(t: Any, picked: list[int] = picked) -> Any:
            return t.detach()[picked] if isinstance(t, Tensor) and t.shape[:1] == (rows,) else t

        batches.append((torch.tensor(changed), tree_map(pick, call)))
    return batches


class _Results:
    """What one run returned that has the batch in axis 0, and where it left the random numbers."""

    def __init__(self, module: nn.Module, run: Run, call: Call, rows_per_sample: int) -> None:
        rows = 2 * rows_per_sample
        with without_trace(module):
            leaves = tree_leaves(run(*call, rows))
            self._random = torch.get_rng_state()
        self._tensors = [
            t.detach().unflatten(0, (2, rows_per_sample))
            for t in leaves
            if isinstance(t, Tensor) and t.shape[:1] == (rows,)
        ]

    def comparable(self, other: _Results) -> bool:
        """Whether both drew as many random numbers, and returned the same shapes."""
        shapes = ([t.shape for t in results._tensors] for results in (self, other))
        return torch.equal(self._random, other._random) and len({str(found) for found in shapes}) == 1

    def moved(self, other: _Results, samples: list[int]) -> bool:
        """Whether the results of some of these samples differ by more than rounding."""
        pairs = zip(self._tensors, other._tensors, strict=True)
        return any(_differ(a[n], b[n]) for a, b in pairs for n in samples)


def _differ(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return not torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max()) if a.numel() else 0.0
    tolerance = torch.finfo(a.dtype).eps ** 0.75 * scale
    return not torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _why(module: nn.Module, batches: list[tuple[Tensor, Call]]) -> str:
    """Name the submodule that mixes, if it is to be found."""
    try:
        why = why_mixed(module, batches, list(module.buffers()))
    except ConfigError:
        why = None
    return why or (
        f"{type(module).__name__} mixes samples: one's output moved when another was exchanged. Compute "
        "over other axes than the batch (axis 0), normalise with GroupNorm or LayerNorm, or use its eval() "
        "mode; psgrad.check_rows_independent(model, inputs) looks for the submodule."
    )
