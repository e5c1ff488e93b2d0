"""Embeddings that are looked up once for the whole batch: position tables, `[1, T]` or `[T]`.

Their rows are no sample's, and a sum over the batch would hide who contributed what. So every sample looks
its own up, and the model gets a stand-in for the one table that it asked for: whatever it does with it until
the batch's rows meet it is done for each sample (`psgrad.capture.direct`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture.direct import Direct, UnknownUse
from psgrad.capture.survey import Layer, OtherRowsError
from psgrad.errors import CaptureError

__all__ = ["SharedRows"]


@dataclass
class _Call:
    """Of the model, with as many rows; `direct` once there is a stand-in."""

    module: nn.Module
    inputs: tuple[Any, Any]
    rows: int | None
    direct: Direct | None = None


class SharedRows:
    """Which embeddings of a model are looked up for the whole batch, and what a call does with them.

    Trials tell (`psgrad.capture.learning`): these get as many rows whatever the number of samples. If the
    model does with one what is not known to keep samples apart, the module around it must become a region.

    Parameters
    ----------
    make
        Makes what runs on a batch of so many rows as a whole; see `Direct`.

    """

    def __init__(self, make: Callable[[int, UnknownUse], Direct]) -> None:
        self._make = make
        self._paths: set[str] = set()
        self._call: _Call | None = None
        self._last: _Call | None = None  # without its inputs

    def run(
        self, module: nn.Module, inputs: tuple[Any, Any], rows: int | None, run: Callable[[], Any]
    ) -> Any:
        """Run the model, with stand-ins; `inputs` are what it was called with, of so many rows.

        Raises
        ------
        OtherRowsError
            Naming an embedding, if one was used in an unknown way.

        """
        before, self._call = self._call, _Call(module, inputs, rows)
        try:
            out = run()
        finally:
            call, self._call = self._call, before
            self._last = _Call(module, ((), {}), rows)
            if call.direct is not None:
                call.direct.end()
        return out if call.direct is None else call.direct.returned(out)

    def has(self, layer: Layer, x: Tensor, *, trying: bool) -> bool:
        """Whether x, the input of a layer with a rule, is for all samples alike.

        Raises
        ------
        CaptureError
            If it is, but outside of the model's call, where nobody knows how many there are.

        """
        if layer.rule is None or not layer.rule.looks_up:
            return False
        if layer.path in self._paths:
            if self._present() is None:
                raise CaptureError(
                    f"{layer} is looked up once for the whole batch, and was called by itself: call the model"
                )
            return True
        if self._call is None or x.shape[:1] == (self._call.rows,):
            return False
        if trying:
            self._paths.add(layer.path)
        return trying or self._call.rows == 0

    def look_up(
        self, layer: Layer, run: Callable[[Tensor], Tensor], x: Tensor, rows_per_sample: int
    ) -> Tensor:
        """Return a stand-in for an embedding of x; `run` computes and captures it for `[N, ..]`."""
        call = self._present()
        assert call is not None
        assert call.rows is not None
        if call.direct is None:
            call.direct = self._make(call.rows, _refused if call is self._call else _refused_again)
            call.direct.begin(call.module, *call.inputs)
        return call.direct.computed(run(x.expand(call.rows // rows_per_sample, *x.shape)), layer)

    def _present(self) -> _Call | None:
        """Return the model's call; where a checkpoint runs a part of it again in backward, as it was."""
        in_backward = torch._C._current_graph_task_id() >= 0
        return self._last if self._call is None and in_backward else self._call


def _refused(reason: str, layer: Layer | None) -> OtherRowsError:
    assert layer is not None
    return OtherRowsError(layer, f"looked up for the whole batch, and {reason}")


def _refused_again(reason: str, layer: Layer | None) -> CaptureError:
    return CaptureError(
        f"{layer} is looked up once for the whole batch, and a checkpoint ran it again in backward: {reason}."
        " Between a call and its backward, call the model only with as many rows."
    )
