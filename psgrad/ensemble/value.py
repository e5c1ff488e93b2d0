"""A value between two layers of K members, and how its member axis lies.

Shapes are written as the member sees them, `NC...`. K stands in one of three places:

    SHARED   NC...        the same for every member, held once
    STACKED  KNC...       in front
    FOLDED   N(KC)...     merged into the channels, K outer: what a grouped convolution takes and gives

The *split* form `NKC...` is a view of a folded value, where values of any layout broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Layout", "Value"]


class Layout(Enum):
    """Where the member axis is."""

    SHARED = "shared"
    STACKED = "stacked"
    FOLDED = "folded"


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor a member, in one tensor."""

    tensor: Tensor
    layout: Layout
    members: int

    @classmethod
    def shared(cls, tensor: Tensor, members: int) -> Value:
        """The same tensor for every member."""
        return cls(tensor, Layout.SHARED, members)

    @classmethod
    def stacked(cls, tensor: Tensor) -> Value:
        """`K...`."""
        return cls(tensor, Layout.STACKED, tensor.shape[0])

    @classmethod
    def folded(cls, tensor: Tensor, members: int) -> Value:
        """`N(KC)...`."""
        return cls(tensor, Layout.FOLDED, members)

    @classmethod
    def of_split(cls, tensor: Tensor) -> Value:
        """`NKC...`, kept folded."""
        return cls(tensor.flatten(1, 2), Layout.FOLDED, tensor.shape[1])

    @property
    def shape(self) -> torch.Size:
        """The shape that a member sees."""
        if self.layout is Layout.SHARED:
            return self.tensor.shape
        if self.layout is Layout.STACKED:
            return self.tensor.shape[1:]
        n, channels, *rest = self.tensor.shape
        return torch.Size((n, channels // self.members, *rest))

    @property
    def rank(self) -> int:
        """Number of axes that a member sees."""
        return len(self.shape)

    def as_stacked(self) -> Tensor:
        """`K...`, a view where strides allow it."""
        if self.layout is Layout.SHARED:
            return self.tensor.expand(self.members, *self.tensor.shape)
        if self.layout is Layout.STACKED:
            return self.tensor
        return self.as_split().movedim(1, 0)

    def as_split(self, rank: int | None = None) -> Tensor:
        """`NKC...`, or `N1C...` of a shared value: broadcasts against any other's; at least two axes.

        `rank` pads the member's shape with axes of length 1 in front, as broadcasting does.
        """
        if self.layout is Layout.FOLDED:
            split = self.tensor.unflatten(1, (self.members, -1))
            return split if rank is None else _padded(split.movedim(1, 0), rank).movedim(0, 1)
        front = self.tensor.unsqueeze(0) if self.layout is Layout.SHARED else self.tensor
        return _padded(front, self.rank if rank is None else rank).movedim(0, 1)

    def as_padded(self, rank: int) -> Tensor:
        """`K...`, or `1...` of a shared value, with the member's shape padded in front to `rank` axes."""
        front = self.tensor.unsqueeze(0) if self.layout is Layout.SHARED else self.as_stacked()
        return _padded(front, rank)

    def as_folded(self) -> Tensor:
        """`N(KC)...`; copies unless it is folded already or strides allow a view."""
        if self.layout is Layout.FOLDED:
            return self.tensor
        return self.as_stacked().movedim(0, 1).flatten(1, 2)

    def for_vmap(self) -> tuple[Tensor, int | None]:
        """Return a view and where its member axis is."""
        if self.layout is Layout.SHARED:
            return self.tensor, None
        return (self.tensor, 0) if self.layout is Layout.STACKED else (self.as_split(), 1)

    def parts(self) -> tuple[Tensor, ...]:
        """Return K views, each as its member sees it."""
        if self.layout is Layout.SHARED:
            return (self.tensor,) * self.members
        return self.as_stacked().unbind()


def _padded(front: Tensor, rank: int) -> Tensor:
    k, *shape = front.shape
    return front.reshape(k, *(1,) * (rank - len(shape)), *shape)
