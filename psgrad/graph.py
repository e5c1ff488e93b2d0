"""What autograd's graph of a tensor hangs on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["leaves_of", "nodes_of"]


def nodes_of(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node, once, that a backward pass from the outputs would go through."""
    seen, waiting = set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Return every tensor, once, whose `.grad` a backward pass from the outputs would add to."""
    return [node.variable for node in nodes_of(outputs) if hasattr(node, "variable")]
