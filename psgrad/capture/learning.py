"""What the first batch tells of a model, in trials with other numbers of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from psgrad.capture.region_inputs import Lengths, RegionInputs
from psgrad.capture.survey import Layer
from psgrad.capture.trial import Layout, in_front, layouts_of, other_numbers_of_samples, without_trace
from psgrad.graph import leaves_of
from psgrad.tensors_in import tensors_in

__all__ = ["Learning", "Run"]

Run = Callable[[Any, Any, int], Any]
"""Runs the whole model on args and kwargs of so many rows."""

Around = Callable[[str, str], Layer | None]
"""Does something to the next module around a path, for a reason, and returns it; None if none is left."""

NOT_AS_THE_BATCH = "an input's axis 0 is not the batch, but may hold it (windows as rows, time first)"
USED_ELSEWHERE = "a parameter is used by a module around"


class Learning:
    """Tells the axis of the batch from others as long, and what must run in a region.

    What does not grow with the number of samples is not the batch, whatever its size: without trials, a
    sequence as long as the batch would pass for it. Modules around inputs whose samples cannot be told apart
    become regions; and those around parameters that are used elsewhere, unless every use is known.

    Parameters
    ----------
    module
        The model.
    owners
        Of every trainable parameter, the path of the module that owns it.
    rows_per_sample
        K.
    widen
        Makes the next module around a path a region, and returns it; None if none is left.
    enclose
        Has the next module around a path run as one that uses parameters itself, and returns it; as `widen`
        if all do.

    Attributes
    ----------
    trying
        Whether a trial is running.
    done
        Whether `learn` has come to its end.
    layout
        Where the model's inputs have the batch.

    """

    def __init__(
        self,
        module: nn.Module,
        owners: Mapping[nn.Parameter, str],
        rows_per_sample: int,
        widen: Around,
        enclose: Around,
    ) -> None:
        self._module = module
        self._owners = owners
        self._rows_per_sample = rows_per_sample
        self._widen = widen
        self._enclose = enclose
        self._inputs = RegionInputs()
        self._results: list[tuple[int, list[int | None]]] = []  # of trials: rows, and lengths of axis 0
        self.layout: Layout = in_front
        self.trying = self.done = False

    def batched(self, path: str, lengths: Lengths, rows: int) -> set[int]:
        """Return which inputs of a region's call are the batch; in a trial, also learn from it."""
        if self.trying:
            self._inputs.see(path, lengths)
        return self._inputs.batched(path, lengths, rows)

    def ran_whole(self, path: str) -> None:
        """Know of a trial's call that no input had to be split into samples."""
        if self.trying:
            self._inputs.ran_whole(path)

    def of_samples(self, position: int) -> bool:
        """Whether the tensor there among the model's results grew as the batch did, as far as is known."""
        return all(position >= len(found) or found[position] == rows for rows, found in self._results)

    def learn(self, run: Run, args: Any, kwargs: Any, rows: int) -> None:
        """Try the batch, until no further module must become a region.

        Parameters
        ----------
        run
            Runs the model, captured.
        args, kwargs, rows
            Its batch, of N K rows.

        Raises
        ------
        Exception
            Whatever the model raises in a trial.

        """
        failed: dict[Layout, Exception] = {}
        for layout in layouts_of((args, kwargs), rows):
            try:
                self._learn(run, args, kwargs, rows, layout)
            except Exception as error:  # whatever a model may raise; another layout may be the right one
                failed[layout] = error
            else:
                self.layout, self.done = layout, True
                return
        raise failed[in_front]

    def _learn(self, run: Run, args: Any, kwargs: Any, rows: int, layout: Layout) -> None:
        self.trying = True
        try:
            while found := self._try_out(run, args, kwargs, rows, layout):
                change, paths, why = found
                changed: list[nn.Module] = []
                for path in paths:
                    inner = self._module.get_submodule(path)
                    if any(inner in set(module.modules()) for module in changed):
                        continue
                    if (layer := change(path, f"{path!r}: {why}")) is not None:
                        changed.append(layer.module)
                if not changed:
                    break  # what cannot be captured is refused in backward, by name
        finally:
            self.trying = False

    def _try_out(
        self, run: Run, args: Any, kwargs: Any, rows: int, layout: Layout
    ) -> tuple[Around, list[str], str] | None:
        """Return what to do with the modules around, the paths of what must run in another way, and why."""
        self._inputs.forget()
        self._results.clear()
        failed: Exception | None = None
        for some_args, some_kwargs, some in other_numbers_of_samples(
            args, kwargs, rows, self._rows_per_sample, layout
        ):
            self._inputs.begin(some)
            try:
                elsewhere = self._used_elsewhere(run, some_args, some_kwargs, some)
            except Exception as error:  # whatever a model may raise; the other trial may tell why
                if around := self._inputs.multiples() or self._inputs.partly_batched():
                    return self._widen, around, NOT_AS_THE_BATCH
                failed = error
                continue
            if elsewhere:
                return self._enclose, elsewhere, USED_ELSEWHERE
        if failed is not None:
            raise failed
        grown = self._inputs.grown()
        return (self._widen, grown, NOT_AS_THE_BATCH) if grown else None

    def _used_elsewhere(self, run: Run, args: Any, kwargs: Any, rows: int) -> list[str]:
        """Run, and return the owners of parameters that the graph shows used outside of what is captured."""
        with without_trace(self._module):
            out = run(args, kwargs, rows)
        results = tensors_in(out)
        self._results.append((rows, [t.shape[0] if t.ndim else None for t in results]))
        leaves = leaves_of(results)
        return [self._owners[p] for p in leaves if isinstance(p, nn.Parameter) and p in self._owners]
