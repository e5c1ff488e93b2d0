"""Whether a module still consists of what it consisted of, at a tenth of the price of walking through it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["ModuleTables", "modules_of"]


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all below, each once, as `list(module.modules())` does, in a third of its time."""
    found = [module]
    seen = {module}
    for held in found:
        for child in held._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


class ModuleTables:
    """The tables in which a module and its submodules keep their modules, parameters and buffers.

    Attributes
    ----------
    modules
        The module and all below, each once.

    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = modules_of(module)
        self._tables: list[dict[str, Any]] = [
            table
            for m in self.modules
            if not isinstance(m, torch.jit.ScriptModule)  # which is as it was compiled, and has no such dicts
            for table in (m._modules, m._parameters, m._buffers)
        ]
        self._sizes = list(map(len, self._tables))
        self._filled = [table for table in self._tables if table]
        self._ids = self._found()

    def hold(self) -> bool:
        """Whether the module still has these modules, parameters and buffers, and no others."""
        return list(map(len, self._tables)) == self._sizes and self._found() == self._ids

    def _found(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._filled))))
