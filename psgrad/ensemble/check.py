"""The first run of every graph, against members that run alone: outputs, buffers and gradients.

A graph can differ from what it was traced from in ways that tracing does not show (an `isinstance` that a
proxy fails). It is used only after the first and the last member have been found to agree with it, and to
have no backward pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_flatten

from psgrad.ensemble.members import member_of
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.graph import nodes_of

__all__ = ["check_against_alone"]

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-2}
"""Relative to the norm. It finds what is wrong, not what is rounded otherwise: BatchNorm over few samples
may amplify rounding to a percent."""
_NEGLIGIBLE = 1e-4
"""Gradients of smaller norm, relative to all parameters', are rounding: a bias in front of a BatchNorm."""


def check_against_alone(
    stacked: nn.Module,
    members: int,
    inputs: Sequence[Tensor],
    own: bool,
    result: Any,
    buffers: dict[str, Tensor],
    states: Sequence[Tensor],
) -> str | None:
    """Where the folded result differs from the first and last member alone; None if it does not.

    Parameters
    ----------
    stacked
        The module that was run, with its buffers after the run.
    members
        K.
    inputs, own
        What it was run on.
    result
        What it returned, trees of `[K, ...]`.
    buffers, states
        Buffers and random states before the run.

    """
    outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    alone = MemberRandomness(states)
    for k in dict.fromkeys((0, members - 1)):
        member = member_of(stacked, k)
        with torch.no_grad():
            for name, buffer in member.named_buffers():
                buffer.copy_(buffers[name][k])
        with alone.of(k):
            expected_tree = member(*(x[k] if own else x for x in inputs))
        expected = [leaf for leaf in tree_flatten(expected_tree)[0] if isinstance(leaf, Tensor)]
        if len(expected) != len(outputs):
            return f"folded, it returns {len(outputs)} tensors, member {k} alone {len(expected)}"
        for output, reference in zip(outputs, expected, strict=True):
            if output.shape[1:] != reference.shape or output.dtype != reference.dtype:
                return f"folded, the output of member {k} has another shape or dtype than alone"
            if _differs(output[k], reference):
                return f"folded, the output of member {k} differs from the member alone"
        for (name, after), buffer in zip(member.named_buffers(), stacked.buffers(), strict=True):
            if _differs(buffer[k], after):
                return f"folded, the buffer {name} of member {k} differs from the member alone"
        # agreeing on one gradient is not enough: it may clip, or count how often it runs
        if any(isinstance(node, BackwardCFunction) for node in nodes_of(expected)):
            return "forward uses a torch.autograd.Function, whose backward a graph does not hold"
        found = _gradients_differ(stacked, member, outputs, expected, k)
        if found:
            return found
    return None


def _gradients_differ(
    stacked: nn.Module, member: nn.Module, outputs: Sequence[Tensor], expected: Sequence[Tensor], k: int
) -> str | None:
    pairs = [(o, e) for o, e in zip(outputs, expected, strict=True) if o.requires_grad or e.requires_grad]
    names = [name for name, p in stacked.named_parameters() if p.requires_grad]
    if not pairs or not names:
        return None
    if any(o.requires_grad != e.requires_grad for o, e in pairs):
        return "folded, an output requires a gradient where it does not alone, or the other way round"
    ours = torch.autograd.grad(
        [o[k] for o, _ in pairs],
        [p for p in stacked.parameters() if p.requires_grad],
        [torch.ones_like(e).cumsum(-1) if e.ndim else torch.ones_like(e) for _, e in pairs],
        retain_graph=True,
        allow_unused=True,
    )
    theirs = torch.autograd.grad(
        [e for _, e in pairs],
        [p for p in member.parameters() if p.requires_grad],
        [torch.ones_like(e).cumsum(-1) if e.ndim else torch.ones_like(e) for _, e in pairs],
        allow_unused=True,
    )
    norms = [0.0 if g is None else float(g.norm()) for g in theirs]
    least = _NEGLIGIBLE * max(norms)
    for name, grad, reference, norm in zip(names, ours, theirs, norms, strict=True):
        if (grad is None) != (reference is None):
            return (
                f"folded, {name} of member {k} has a gradient where it has none alone, or the other way round"
            )
        if grad is None or reference is None or max(float(grad[k].norm()), norm) <= least:
            continue
        if _differs(grad[k], reference):
            return f"folded, the gradient of {name} of member {k} differs from the member alone"
    return None


def _differs(a: Tensor, b: Tensor) -> bool:
    if not b.is_floating_point():
        return not torch.equal(a, b)
    tolerance = _TOLERANCE.get(b.dtype, 5e-2)
    a, b = a.detach().double(), b.detach().double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return True
    a, b = a[finite], b[finite]
    return float((a - b).norm()) > tolerance * float(b.norm()) + 1e-30
