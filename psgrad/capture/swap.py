"""Showing modules other values of their parameters for a while."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from psgrad.layers import rule_for
from psgrad.module_tables import modules_of

__all__ = ["shown", "swapped"]


class _Copies(dict[str, Any]):
    """A module's parameters while a region runs: each sample's copy, made when it is asked for."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], copy: Callable[[nn.Parameter], Tensor]):
        super().__init__(parameters)
        self._copy = copy

    def __getitem__(self, name: str) -> Any:
        p = super().__getitem__(name)
        return p if p is None or not p.requires_grad else self._copy(p)

    def values(self) -> Any:
        return (self[name] for name in self)

    def items(self) -> Any:
        return ((name, self[name]) for name in self)


@contextmanager
def swapped(modules: Iterable[nn.Module], copy: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Let each module's own trainable parameters be `copy` of them, made when they are asked for."""
    undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in modules:
            parameters = module._parameters
            # as they are, also where another block shows copies of them
            if not any(p is not None and p.requires_grad for p in dict.values(parameters)):
                continue
            undo.append((module.__dict__, {"_parameters": parameters}))
            module.__dict__["_parameters"] = _Copies(parameters, copy)
            if isinstance(module, nn.RNNBase):
                undo.append((module.__dict__, _listed(module)))
                weights = [getattr(module, name) for name in module._flat_weights_names]
                module.__dict__.update(_listed(module, weights))
        yield
    finally:
        for attributes, before in reversed(undo):
            attributes.update(before)


def _listed(module: nn.RNNBase, weights: list[Any] | None = None) -> dict[str, Any]:
    """What a recurrent network keeps of its parameters besides, to tell whether they are others now."""
    if weights is None:
        return {name: module.__dict__[name] for name in ("_flat_weights", "_flat_weight_refs")}
    return {"_flat_weights": weights, "_flat_weight_refs": [weakref.ref(w) for w in weights]}


def shown(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are to be shown otherwise; a parametrized layer needs its own."""
    modules = modules_of(module)
    kept = {
        inside
        for layer in modules
        if "parametrizations" in layer._modules and is_parametrized(layer) and rule_for(layer)
        for inside in layer.modules()
    }
    return [m for m in modules if m not in kept] if kept else modules
