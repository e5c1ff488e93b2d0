"""The terms of a loss, read off its autograd graph: how each combines its batch, and times what.

Only what is certain is read. A node that is not known here might divide by the size of the batch, so that
nothing above it is a term.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from psgrad.loss.marks import Output, mark_of
from psgrad.loss.reduction import LossReduction

__all__ = ["Term", "terms_of"]

Node = Any  # torch.autograd.graph.Node, whose saved values are not typed

LOSSES = frozenset(
    {
        "BinaryCrossEntropy",
        "BinaryCrossEntropyWithLogits",
        "HuberLoss",
        "MseLoss",
        "MultiMarginLoss",
        "MultilabelMarginLoss",
        "NllLoss",
        "NllLoss2D",
        "SmoothL1Loss",
        "SoftMarginLoss",
    }
)
"""Losses that are one node and say their reduction: 0 none, 1 mean, 2 sum."""

UNSCALED = frozenset(
    {
        *("Abs", "Add", "Clamp", "ClampMin", "ClampMax", "Clone", "CtcLoss", "Exp", "Expm1", "Log", "Log1P"),
        *("LogSigmoid", "LogSoftmax", "MaskedFill", "Neg", "Pow", "Relu", "Rsub", "Sigmoid", "Softmax"),
        *("Softplus", "Sqrt", "Sub", "Tanh", "ToCopy", "Where"),
        *("Alias", "Gather", "ReshapeAlias", "Squeeze", "Unsqueeze", "UnsafeView", "View"),
    }
)
"""What may lie between a model's output and the loss: it keeps all samples and divides by no number."""

WITHIN_SAMPLES = frozenset({"LinalgVectorNorm", "Logsumexp", "Mean", "Norm", "Select", "Slice", "Sum"})
"""What may lie there over other axes than the batch's."""

THROUGH = frozenset({"Add", "Alias", "Clone", "Neg", "Squeeze", "Sub", "ToCopy", "View"})
"""What may lie between a loss over the batch and the root."""

REDUCTIONS: dict[str, LossReduction] = {"Sum": "sum", "Mean": "mean"}
MOST_NODES = 32
"""How many nodes of a graph are read for one loss: none of torch's has half as many."""


@dataclass(frozen=True)
class Term:
    """A loss over the batch that a model's output is of, times `scale`.

    Attributes
    ----------
    reduction
        How the loss combines its batch.
    scale
        > 0, what it is multiplied by after that.
    name
        What combines it, for messages.
    node
        Of the loss.
    output
        Of the model.

    """

    reduction: LossReduction
    scale: float
    name: str
    node: Node
    output: Output

    @property
    def on_device(self) -> bool:
        """Whether to read what the node has saved is to wait for a device."""
        return self.node._saved_target.device.type != "cpu"

    @property
    def factor(self) -> float:
        """With which a sample's own loss enters."""
        return self.scale / self.output.samples if self.reduction == "mean" else self.scale


def terms_of(root: Node) -> list[Term]:
    """Return the terms of the scalar that `root` computes, as far as they are certain.

    Has to be called before backward frees what the nodes have saved.
    """
    terms: list[Term] = []
    waiting, read = [(root, 1.0)], 0
    while waiting and (read := read + 1) <= MOST_NODES:
        node, scale = waiting.pop()
        name = _name(type(node).__name__)
        below = [child for child, _ in node.next_functions if child is not None]
        if name in LOSSES and node._saved_reduction and _unweighted(node):
            reduction: LossReduction = "mean" if node._saved_reduction == 1 else "sum"
            if (output := _output_of(below)) is not None:
                terms.append(Term(reduction, scale, f'{name} with reduction="{reduction}"', node, output))
        elif name in THROUGH or (name in REDUCTIONS and not node._saved_self_sym_sizes):  # of a scalar
            waiting += [(child, scale) for child in below]
        elif name in REDUCTIONS and (not hasattr(node, "_saved_dim") or len(node._saved_self_sym_sizes) == 1):
            if (output := _output_of(below)) is not None:
                terms.append(Term(REDUCTIONS[name], scale, f".{name.lower()}()", node, output))
        elif name in ("Mul", "Div") and (times := _scalar(node, name)) is not None:
            waiting += [(child, scale * times) for child in below]
    return terms


@lru_cache
def _name(kind: str) -> str:
    """`NllLossBackward0` -> `NllLoss`; "" for a function of one's own, which has no number."""
    match = re.fullmatch(r"(\w+)Backward\d+", kind)
    return match[1] if match else ""


def _unweighted(node: Node) -> bool:
    """Whether no weight may stand for a division; class weights under "mean" divide by themselves."""
    weight = getattr(node, "_saved_weight", None)
    return weight is None or (node._saved_reduction == 1 and hasattr(node, "_saved_total_weight"))


def _output_of(nodes: list[Node]) -> Output | None:
    """Return a model's output that one of the nodes computes with, sample by sample and undivided."""
    waiting = [(node, 0) for node in nodes]
    seen = set(nodes)
    while waiting and len(seen) <= MOST_NODES:
        node, rows = waiting.pop()
        output = mark_of(node)
        if output is not None:
            if rows % output.samples == 0 and not output.members:
                return output
            continue
        kept = _rows_kept(node)
        if kept is not None:
            below = [child for child, _ in node.next_functions if child is not None and child not in seen]
            seen.update(below)
            waiting += [(child, math.gcd(rows, kept)) for child in below]
    return None


def _rows_kept(node: Node) -> int | None:
    """Say how many rows of the batch a node keeps undivided, 0 for all, None if that is not known."""
    name = _name(type(node).__name__)
    if name in LOSSES:
        return 0 if not node._saved_reduction and getattr(node, "_saved_weight", None) is None else None
    if name in WITHIN_SAMPLES:
        sizes = getattr(node, "_saved_self_sym_sizes", None) or node._saved_self.shape
        dims = getattr(node, "_saved_dim", None)
        dims = (dims,) if isinstance(dims, int) else dims
        return sizes[0] if dims and all(_from_front(dim, len(sizes)) for dim in dims) else None
    if name == "Index":
        first = node._saved_indices[0]
        return 0 if first is None else first.numel()
    return 0 if name in UNSCALED else None


def _from_front(dim: int, axes: int) -> int:
    """Count an axis from the front; the nodes hold negative ones as unsigned 64-bit numbers."""
    return (dim - (1 << 64) if dim >> 63 else dim) % axes


def _scalar(node: Node, name: str) -> float | None:
    """Return what a node multiplies by, without its sign, if that is a number known without waiting."""
    left = node.next_functions[0][0] is not None
    other = node._saved_other if left else node._saved_self
    if isinstance(other, Tensor):
        if other.numel() != 1 or other.device.type != "cpu" or other.requires_grad:
            return None
        other = other.item()
    if (name == "Div" and not left) or not isinstance(other, (int, float)) or not 0 < abs(other) < math.inf:
        return None
    return abs(other) if name == "Mul" else 1 / abs(other)
