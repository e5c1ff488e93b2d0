"""What autograd's graph of a tensor hangs on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["leaves_among", "leaves_of", "nodes_behind", "nodes_of"]


def nodes_of(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node, once, that a backward pass from the outputs would go through."""
    return nodes_behind(output.grad_fn for output in outputs)


def nodes_behind(nodes: Iterable[Any]) -> Iterator[Any]:
    """Every node, once, that a backward pass from these would go through, themselves included; no None."""
    seen, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Return every tensor, once, whose `.grad` a backward pass from the outputs would add to."""
    return list(leaves_among(nodes_of(outputs)))


def leaves_among(nodes: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor to whose `.grad` one of the nodes would add."""
    return (node.variable for node in nodes if hasattr(node, "variable"))
