"""Embeddings that are looked up once for the whole batch: position tables, `[1, T]` or `[T]`.

Their rows are no sample's, and a sum over the batch would hide who contributed what. So every sample looks
its own up, and the model gets a stand-in for the one table that it asked for: whatever it does with it until
the batch's rows meet it is done for each sample (`psgrad.capture.direct`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from psgrad.capture.direct import Direct
from psgrad.capture.survey import Layer, OtherRowsError
from psgrad.errors import CaptureError

__all__ = ["SharedRows"]


class SharedRows:
    """Which embeddings of a model are looked up for the whole batch, and what a call does with them.

    Trials tell (`psgrad.capture.learning`): these get as many rows whatever the number of samples. If the
    model does with one what is not known to keep samples apart, the module around it must become a region.
    """

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._direct: Direct | None = None

    def run(self, direct: Direct, module: nn.Module, inputs: Any, run: Callable[[], Any]) -> Any:
        """Run the model, with stand-ins of `direct`; `inputs` are what it was called with.

        Raises
        ------
        OtherRowsError
            Naming an embedding, if one was used in an unknown way.

        """
        before, self._direct = self._direct, direct
        try:
            with direct.given(module, inputs):
                out = run()
        finally:
            self._direct = before
        direct.check(out)
        return out

    def has(self, layer: Layer, x: Tensor, rows: int | None, *, trying: bool) -> bool:
        """Whether x, the input of a layer with a rule, is for all samples alike, which have so many rows.

        Raises
        ------
        CaptureError
            If it is, but outside of the model's call, where nobody knows how many there are.

        """
        if layer.rule is None or not layer.rule.looks_up:
            return False
        if self._direct is None:
            if layer.path in self._paths:
                raise CaptureError(
                    f"{layer} is looked up once for the whole batch, and was called outside of the model's "
                    "call. If torch.utils.checkpoint runs it again: leave it out of the checkpoint."
                )
            return False
        if trying and x.shape[:1] != (rows,):
            self._paths.add(layer.path)
        return layer.path in self._paths or (rows == 0 and len(x) > 0)

    def look_up(self, layer: Layer, run: Callable[[Tensor], Tensor], x: Tensor, samples: int) -> Tensor:
        """Return a stand-in for an embedding of x; `run` computes and captures it for `[N, ..]`."""
        assert self._direct is not None
        return self._direct.computed(run(x.expand(samples, *x.shape)), layer)

    @staticmethod
    def refused(reason: str, layer: Layer | None) -> OtherRowsError:
        """Return what an unknown use is told by."""
        assert layer is not None
        return OtherRowsError(layer, f"looked up for the whole batch, and {reason}")
