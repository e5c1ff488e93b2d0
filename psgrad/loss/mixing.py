"""Whether a loss mixes samples: whether one sample's gradient at the outputs moves with another's outputs.

Autograd's nodes are called one by one, from the loss to the outputs and no further, instead of by its engine:
so nothing is freed, no hook runs, and no `.grad` is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

from psgrad.loss.marks import Output, mark_of

__all__ = ["Head", "heads_of"]

Node = Any
Edge = tuple[Node, int]  # a node, and which of its outputs


@dataclass(frozen=True)
class Head:
    """What computes a loss from models' outputs of N samples each.

    Attributes
    ----------
    roots
        What the loss is the sum of.
    outputs
        Of the models, by where the graph has them.

    """

    roots: tuple[Tensor, ...]
    outputs: dict[Edge, Output] = field(default_factory=dict)

    def mixes(self) -> bool | None:
        """Tell whether it mixes samples; None if that is not to be told.

        With L the loss, z [N, ...] the outputs, I some samples and r random numbers,
        h = d/dz sum_(n in I) r[n] . dL/dz[n] must be zero in all samples that are not in I. It is zero in all
        where a gradient does not depend on the outputs (L1). Autograd functions of one's own (a compiled loss
        is one) and what cannot be differentiated twice say nothing.
        """
        plain = saved_tensors_hooks(Tensor.detach, Tensor.detach)  # nor those of somebody around
        device = self.roots[0].device.type
        try:
            with torch.enable_grad(), torch.autocast(device, enabled=False), plain:
                return self._mixes()
        except Exception:  # whatever a node raises: it has no second derivative, or backward will tell
            return None

    def _mixes(self) -> bool | None:
        ends = {node for node, _ in self.outputs}
        grads = _pulled_back({(r.grad_fn, r.output_nr): torch.ones_like(r) for r in self.roots}, ends)
        seeds: dict[Edge, Tensor] = {}
        chosen = torch.Generator().manual_seed(0)  # nobody else's
        samples = next(iter(self.outputs.values())).samples
        inside = torch.rand(samples, generator=chosen) < 0.5
        inside[0], inside[-1] = True, False
        for edge, g in grads.items():
            if not g.is_floating_point():
                return None
            if g.grad_fn is not None:
                r = torch.randn(g.shape, generator=chosen)
                _by_sample(r, self.outputs[edge])[~inside] = 0  # a view
                seeds[g.grad_fn, g.output_nr] = r.to(g)
        with torch.no_grad():
            found = [_by_sample(h, self.outputs[edge]) for edge, h in _pulled_back(seeds, ends).items()]
        largest = max((float(h.abs().max()) for h in found), default=0.0)
        if not 0 < largest < torch.inf:
            return None
        beside = max(float(h[~inside.to(h.device)].abs().max()) / torch.finfo(h.dtype).eps for h in found)
        return beside > ROUNDING * largest


ROUNDING = 4
"""Of as many units in the last place of what is largest."""


def heads_of(roots: Iterable[Tensor]) -> list[Head]:
    """Return what computes the loss that these scalars add up to, from all outputs of as many samples."""
    by_samples: dict[int, Head] = {}
    roots = tuple(roots)
    waiting: list[Edge] = [(root.grad_fn, root.output_nr) for root in roots]
    seen = set(waiting)
    while waiting:
        edge = waiting.pop()
        output = mark_of(edge[0])
        if output is not None:
            by_samples.setdefault(output.samples, Head(roots)).outputs[edge] = output
            continue
        below = {(child, nr) for child, nr in edge[0].next_functions if child is not None} - seen
        seen |= below
        waiting += below
    return list(by_samples.values())


def _by_sample(t: Tensor, output: Output) -> Tensor:
    """Return [*members, N K, ...] as [N, K, *members, ...]."""
    return t.movedim(len(output.members), 0).unflatten(0, (output.samples, -1))


def _pulled_back(seeds: Mapping[Edge, Tensor], ends: set[Node]) -> dict[Edge, Tensor]:
    """Return the gradients of the seeds' nodes at the nodes where it ends, as a differentiable graph.

    Raises
    ------
    NotImplementedError
        For an autograd function of one's own on the way.

    """
    order = _leading(seeds, ends)
    reached: dict[Node, dict[int, Tensor]] = {}
    for (node, nr), g in seeds.items():
        reached.setdefault(node, {})[nr] = g
    for node in order:
        given = reached.pop(node, None)
        if not given:
            continue
        if isinstance(node, BackwardCFunction):
            raise NotImplementedError
        grads = node(*[given.get(nr) for nr in range(len(node._input_metadata))])
        grads = grads if isinstance(grads, tuple) else (grads,)
        for (child, nr), g in zip(node.next_functions, grads, strict=True):
            if g is None or not (child in ends or child in order):
                continue
            like = child._input_metadata[nr]
            g = g.sum_to_size(like.shape).to(like.dtype)  # of what was broadcast, as the engine does
            into = reached.setdefault(child, {})
            into[nr] = into[nr] + g if nr in into else g
    return {(end, nr): g for end in ends & reached.keys() for nr, g in reached[end].items()}


def _leading(starts: Iterable[Edge], ends: set[Node]) -> dict[Node, None]:
    """Return the nodes on ways from the starts to the ends, none before one that leads to it."""
    leads: dict[Node, bool] = {}  # in the order in which all below is known
    waiting = [(node, False) for node, _ in starts]
    while waiting:
        node, known = waiting.pop()
        if node in ends or (node in leads and not known):
            continue
        below = [child for child, _ in node.next_functions if child is not None]
        if known:
            leads[node] = any(child in ends or leads.get(child, False) for child in below)
        else:
            waiting += [(node, True), *((child, False) for child in below)]
    return dict.fromkeys(node for node in reversed(leads) if leads[node])
