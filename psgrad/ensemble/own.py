"""What a member is called with, and its part of data that has the member axis in front."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Arguments", "arguments_of", "holds_tensors", "part_of"]


class Arguments(tuple[Any, ...]):
    """The values that a module is called with, those given by name at the end.

    Attributes
    ----------
    names
        Of the last ones.

    """

    names: tuple[str, ...]

    def __new__(cls, values: Sequence[Any], names: Sequence[str] = ()) -> Arguments:
        """Make them of values and the names of the last ones."""
        arguments = super().__new__(cls, values)
        arguments.names = tuple(names)
        return arguments

    def of(self, k: int, own: bool) -> Arguments:
        """Member k's: with `own`, its part."""
        return Arguments([part_of(value, k) for value in self], self.names) if own else self

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments, and those by name."""
        at = len(self) - len(self.names)
        return tuple(self[:at]), dict(zip(self.names, self[at:], strict=True))

    def given_to(self, module: nn.Module) -> Any:
        """Call a module with them."""
        if not self.names:
            return module(*self)
        args, named = self.split()
        return module(*args, **named)

    def part_given_to(self, module: nn.Module, k: int) -> Any:
        """Call a module with member k's part of them."""
        if not self.names:
            return module(*[part_of(value, k) for value in self])
        return self.of(k, True).given_to(module)


def arguments_of(module: nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> Arguments:
    """Return what `module(*inputs, **named)` is called with, by position where that is the same.

    Raises
    ------
    TypeError
        If its forward does not take these.

    """
    if not named:
        return Arguments(inputs)
    bound = inspect.signature(module.forward).bind(*inputs, **named)
    return Arguments([*bound.args, *bound.kwargs.values()], list(bound.kwargs))


def part_of(tree: Any, k: int) -> Any:
    """Return `value[k]` of every tensor of a tree; what is no tensor is every member's."""
    if isinstance(tree, Tensor):
        return tree[k]
    return tree_map(lambda value: value[k] if isinstance(value, Tensor) else value, tree)


def holds_tensors(leaf: Any) -> bool:
    """Whether a leaf of a tree is no tensor and has some in attributes, where `part_of` does not reach."""
    held = None if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", None)
    return any(isinstance(value, Tensor) for value in tree_leaves(held))
