"""What autograd's graph of a tensor hangs on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["leaves_of"]


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Return every tensor, once, whose `.grad` a backward pass from the outputs would add to."""
    leaves, seen, waiting = [], set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
