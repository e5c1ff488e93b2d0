"""The names by which a script asks the wrapper that Opacus puts around a model, on the model itself."""

from __future__ import annotations

from torch import nn

from psgrad.dp.optimizer import PrivateOptimizer

__all__ = ["give_wrapper_names"]

METHODS = ("zero_grad", "cleanup", "remove_hooks", "to_standard_module")
"""Those of `opacus.GradSampleModule` that mean the same here."""


def give_wrapper_names(module: nn.Module, optimizer: PrivateOptimizer) -> None:
    """Let `module._module` be the module, and it have `METHODS`, until the clip handle is removed.

    They stand in the instance's `__dict__`, where no `state_dict`, `named_modules` or `repr` looks. A copy
    has the same names, of its own, and is attached to nothing. A name that the module has already stays.
    """
    wrapper = _Wrapper(module, optimizer)
    given = {"_module": module, **{name: getattr(wrapper, name) for name in METHODS}}
    names = [name for name in given if name == "zero_grad" or not hasattr(module, name)]
    module.__dict__.update({name: given[name] for name in names})

    def take_back() -> None:
        for name in names:
            module.__dict__.pop(name, None)

    optimizer.clip.on_removal(take_back)


class _Wrapper:
    """A module seen as the wrapper around itself; without an optimizer, of a copy."""

    def __init__(self, module: nn.Module, optimizer: PrivateOptimizer | None = None) -> None:
        self._module = module
        self._optimizer = optimizer

    def __reduce__(self) -> tuple[type[_Wrapper], tuple[nn.Module]]:
        return _Wrapper, (self._module,)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients as the private optimizer does, and with them what they were gathered of."""
        type(self._module).zero_grad(self._module, set_to_none)
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def cleanup(self) -> None:
        """Detach from the module."""
        if self._optimizer is not None:
            self._optimizer.clip.remove()

    def remove_hooks(self) -> None:
        """Detach from the module."""
        self.cleanup()

    def to_standard_module(self) -> nn.Module:
        """Detach from the module, and return it."""
        self.cleanup()
        return self._module
