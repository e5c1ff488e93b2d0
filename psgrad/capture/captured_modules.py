"""The modules of a model that run captured: those that own parameters, and those that had to be added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from psgrad.capture.shadow import replaced_forward, shadow_forward, unshadow_forward
from psgrad.capture.survey import Layer, is_inside

if TYPE_CHECKING:
    from psgrad.capture.owners import Owners

__all__ = ["CapturedModules"]


class CapturedModules:
    """Shadows the forward of every module but the model itself, whose call is another.

    Parameters
    ----------
    model
        Whose modules they are.
    run
        Runs one: gets the layer, its forward, and the call's arguments.
    found
        Those that own trainable parameters.

    """

    def __init__(self, model: nn.Module, run: Callable[..., Any], found: Iterable[Layer]) -> None:
        self._model = model
        self._run = run
        self._layers: dict[str, Layer] = {}
        for layer in found:
            self._attach(layer)

    @property
    def model(self) -> Layer | None:
        """The model itself, if it is one of them."""
        return self._layers.get("")

    def _attach(self, layer: Layer) -> None:
        self._layers[layer.path] = layer
        if layer.module is not self._model:
            shadow_forward(layer.module, partial(self._run, layer))

    def remove(self) -> None:
        """Give the modules back as they were."""
        for layer in self._layers.values():
            unshadow_forward(layer.module)
        self._layers.clear()

    def regions(self, own: Owners) -> dict[str, str]:
        """By path, the modules that run one sample at a time, without those inside of others, and why."""
        found = [path for path, layer in self._layers.items() if layer.rule is None and own.is_told(path)]
        return {path: own.why(path) for path in found if not any(is_inside(path, other) for other in found)}

    def widen(self, path: str, own: Owners, why: str) -> Layer | None:
        """Make the next module around this one a region, where all rows are one sample's; None if none is."""
        for around, module in self._around(path):
            layer = self._layers.get(around)
            if layer is None:
                self._attach(layer := Layer(around, module, None))
            elif layer.rule is not None or own.is_region(around):
                continue
            own.make_region(around, why)
            return layer
        return None

    def enclose(self, path: str, own: Owners, why: str) -> Layer | None:
        """Run the next module around this one as one that uses its parameters itself; or widen if all do."""
        for around, module in self._around(path):
            if around not in self._layers:
                self._attach(layer := Layer(around, module, None))
                return layer
        return self.widen(path, own, why)

    def _around(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules around a path that are called, from the inside."""
        while path:
            path = path.rpartition(".")[0]
            module = self._model.get_submodule(path)
            calls = type(module).forward is not nn.Module.forward and replaced_forward(module) is None
            if calls or not path or path in self._layers:
                yield path, module
