"""Products of the batch with a parameter over any axes, in terms of layers that have a rule.

`einsum`, `tensordot`, and `matmul` with a weight that is no matrix. Axes that both have and the result has
not are a linear map's inputs, those of the weight alone its outputs, those of the batch alone positions. Axes
that all three have are groups (heads), with a map for each. Where there are no inputs and no outputs, the
weight is a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psgrad.capture.stand_in import StandIn
from psgrad.layers.grouped_linear import grouped_linear

__all__ = ["CONTRACTIONS"]

Labels = str
"""A letter for every axis of a tensor."""


@dataclass(frozen=True)
class _Axes:
    """Labels by what becomes of them, of the batch x, a weight and their product.

    Attributes
    ----------
    batch, positions
        Of x and the product: the samples, and all others.
    groups
        Of all three.
    inputs
        Of x and the weight.
    outputs
        Of the weight and the product.
    sizes
        By label.

    """

    batch: Labels
    positions: Labels
    groups: Labels
    inputs: Labels
    outputs: Labels
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, of_x: Labels, of_weight: Labels, of_out: Labels, sizes: Mapping[str, int]) -> _Axes:
        """Tell them apart. No label is in one of the three only."""
        return cls(
            batch=of_x[0],
            positions="".join(label for label in of_x[1:] if label not in of_weight),
            groups="".join(label for label in of_weight if label in of_x and label in of_out),
            inputs="".join(label for label in of_weight if label not in of_out),
            outputs="".join(label for label in of_weight if label not in of_x),
            sizes=sizes,
        )

    def lengths(self, labels: Labels) -> list[int]:
        """One for each."""
        return [self.sizes[label] for label in labels]

    def length(self, labels: Labels) -> int:
        """Of all of them as one axis."""
        return torch.Size(self.lengths(labels)).numel()


def _contracted(x: Any, of_x: Labels, weight: Any, of_weight: Labels, of_out: Labels) -> Any:
    """Return the product of x, whose first axis is the batch, and a weight.

    Raises
    ------
    ValueError
        If it is of another kind.

    """
    for t, labels in ((x, of_x), (weight, of_weight)):
        if t.ndim != len(labels) or len(set(labels)) < len(labels):
            raise ValueError(f"a product of {tuple(t.shape)} as {labels!r}")
    sizes = {**dict(zip(of_x, x.shape, strict=True)), **dict(zip(of_weight, weight.shape, strict=True))}
    if [sizes[label] for label in of_x] != list(x.shape):
        raise ValueError(f"a product of {tuple(x.shape)} and {tuple(weight.shape)}, which has to repeat one")
    if of_x[0] in of_weight or of_x[0] not in of_out:
        raise ValueError("a product over samples")
    if not set(of_out) <= sizes.keys() or len(set(of_out)) < len(of_out):
        raise ValueError(f"a product that gives {of_out!r}")
    x, of_x = _summed(x, of_x, of_weight + of_out)
    weight, of_weight = _summed(weight, of_weight, of_x + of_out)
    axes = _Axes.of(of_x, of_weight, of_out, sizes)
    ordered = _in_order(weight, of_weight, axes.groups + axes.outputs + axes.inputs)
    compute = _grouped if axes.groups else _linear_map
    if not axes.inputs and not axes.outputs:
        compute = _scaled
    out, of_found = compute(axes, x, of_x, ordered)
    return _in_order(out, of_found, of_out)


def _scaled(axes: _Axes, x: Any, of_x: Labels, weight: Any) -> tuple[Any, Labels]:
    order = axes.batch + axes.positions + axes.groups
    return _in_order(x, of_x, order) * weight, order


def _linear_map(axes: _Axes, x: Any, of_x: Labels, weight: Any) -> tuple[Any, Labels]:
    rows = _in_order(x, of_x, axes.batch + axes.positions + axes.inputs)
    rows = rows.reshape(len(x), *axes.lengths(axes.positions), axes.length(axes.inputs))
    out = F.linear(rows, weight.reshape(axes.length(axes.outputs), axes.length(axes.inputs)))
    found = axes.positions + axes.outputs
    return out.reshape(len(x), *axes.lengths(found)), axes.batch + found


def _grouped(axes: _Axes, x: Any, of_x: Labels, weight: Any) -> tuple[Any, Labels]:
    rows = _in_order(x, of_x, axes.batch + axes.groups + axes.positions + axes.inputs)
    groups, outputs, inputs = map(axes.length, (axes.groups, axes.outputs, axes.inputs))
    rows = rows.reshape(len(x), groups, axes.length(axes.positions), inputs)
    out = grouped_linear(rows, weight.reshape(groups, outputs, inputs))
    found = axes.groups + axes.positions + axes.outputs
    return out.reshape(len(x), *axes.lengths(found)), axes.batch + found


def _summed(t: Any, labels: Labels, elsewhere: Labels) -> tuple[Any, Labels]:
    """Sum over axes that nothing else has."""
    alone = [axis for axis, label in enumerate(labels) if label not in elsewhere]
    return (t.sum(alone), "".join(label for label in labels if label in elsewhere)) if alone else (t, labels)


def _in_order(t: Any, labels: Labels, order: Labels) -> Any:
    return t if labels == order else t.permute([labels.index(label) for label in order])


def _product(first: Any, of_first: Labels, other: Any, of_other: Labels, of_out: Labels) -> Any:
    """Return a product in which either may be the weight."""
    if isinstance(first, StandIn) and first.rows is None:
        return _contracted(other, of_other, first, of_first, of_out)
    return _contracted(first, of_first, other, of_other, of_out)


def _letters(taken: Iterable[str] = ()) -> Callable[[int], Labels]:
    """Return what gives so many letters that have not been taken."""
    unused = (letter for letter in map(chr, count(ord("A"))) if letter.isalpha() and letter not in set(taken))
    return lambda n: "".join(next(unused) for _ in range(n))


def _einsum(equation: Any, *operands: Any) -> Any:
    """As `torch.einsum`.

    Raises
    ------
    ValueError
        If it is of more than two, or axes are given by numbers.

    """
    if not isinstance(equation, str) or len(operands) != 2:
        raise ValueError("einsum of more than a parameter and the batch")
    given, arrow, of_out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if not arrow:
        once = sorted(label for label in set(given) - set(",.") if given.count(label) == 1)
        of_out = ("..." if "..." in given else "") + "".join(once)
    rest = [t.ndim - len(term.replace("...", "")) for t, term in zip(operands, terms, strict=True)]
    hidden = _letters(equation)(max(0, *rest))  # aligned at their ends, as torch has them
    terms = [term.replace("...", hidden[len(hidden) - n :]) for term, n in zip(terms, rest, strict=True)]
    of_out = of_out.replace("...", hidden)
    return _product(operands[0], terms[0], operands[1], terms[1], of_out)


def _tensordot(a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    if out is not None:
        raise ValueError("tensordot into a tensor")
    over_a, over_b = (range(-dims, 0), range(dims)) if isinstance(dims, int) else dims
    letter = _letters()
    of_a, of_b = list(letter(a.ndim)), list(letter(b.ndim))
    for i, j in zip(over_a, over_b, strict=True):
        of_b[j] = of_a[i]
    of_out = [label for label in of_a + of_b if not (label in of_a and label in of_b)]
    return _product(a, "".join(of_a), b, "".join(of_b), "".join(of_out))


def _matmul(x: Any, other: Any) -> Any:
    """Return `x @ other`, of which one may be a vector or have matrices for every head."""
    inner, row, column = "irc"
    end_of_x = inner if x.ndim == 1 else row + inner
    end_of_other = inner if other.ndim == 1 else inner + column
    before_x, before_other = x.ndim - len(end_of_x), other.ndim - len(end_of_other)
    before = _letters("irc")(max(before_x, before_other))  # aligned at their ends, as torch has them
    of_x = before[len(before) - before_x :] + end_of_x
    of_other = before[len(before) - before_other :] + end_of_other
    of_out = before + (end_of_x + end_of_other).replace(inner, "")
    return _product(*_unrepeated(x, of_x, other, of_other), *_unrepeated(other, of_other, x, of_x), of_out)


def _unrepeated(t: Any, labels: Labels, other: Any, of_other: Labels) -> tuple[Any, Labels]:
    """Take out axes of length 1 that are repeated as often as the other has them, but never the batch."""
    of_weight = isinstance(t, StandIn) and t.rows is None
    longer = {label for label, size in zip(of_other, other.shape, strict=True) if size > 1 or of_weight}
    kept = [
        axis
        for axis, label in enumerate(labels)
        if t.shape[axis] > 1 or label in "irc" or label not in longer or (axis == 0 and not of_weight)
    ]
    return t.reshape([t.shape[axis] for axis in kept]), "".join(labels[axis] for axis in kept)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product of x and a vector."""
    out = _matmul(x, weight)
    return out if bias is None else out + bias


CONTRACTIONS: dict[Any, Callable[..., Any]] = {
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.linear: _linear,
}
"""By torch's function, where no layer takes its arguments as they are."""
