"""Marks on the autograd graph: which nodes made the output of a model that is captured."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psgrad.tensors_in import tensors_in

if TYPE_CHECKING:
    from psgrad.loss.check import LossCheck

__all__ = ["Output", "mark", "mark_of"]

Node = Any
KEY = "psgrad.loss"


@dataclass(frozen=True)
class Output:
    """That a node made an output of a model, with N samples in axis 0.

    Attributes
    ----------
    check
        Of the handle that is attached to the model; it may be gone.
    samples
        N.
    members
        () or, of an ensemble, (K,): what is in front of the batch.

    """

    check: weakref.ref[LossCheck]
    samples: int
    members: tuple[int, ...] = ()


def mark(out: Any, check: LossCheck, samples: int, rows: int, members: tuple[int, ...] = ()) -> None:
    """Mark whatever made the tensors in `out` that have the batch, N samples in so many rows, in front.

    The marks live and die with the graph.
    """
    for leaf in tensors_in(out):
        if leaf.grad_fn is not None and leaf.shape[: len(members) + 1] == (*members, rows):
            node: Node = leaf.grad_fn  # whose metadata is typed as a method
            node.metadata[KEY] = Output(weakref.ref(check), samples, members)


def mark_of(node: Node) -> Output | None:
    """Return the mark of a node."""
    found = node.metadata.get(KEY)
    return found if isinstance(found, Output) else None
