"""One call of a module whose backward can run several times within one backward pass of the loss.

`loss.backward()` frees the graph that it passes. So what the module computes is a graph of its own, and the
graph of the loss holds one node in its place. When the loss's backward reaches that node it runs the
module's, which stays until it is ended, and can be run again from the same gradients of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from psgrad.capture.once import differentiable_once
from psgrad.errors import CaptureError

__all__ = ["Gate", "RepeatableCall"]


@dataclass
class Gate:
    """What the nodes inside of a call's graph know of it: not the graph itself, which would never be freed.

    Attributes
    ----------
    open
        Whether a backward that came through the outputs is in the graph.
    input_grads
        By input that requires grad, what has arrived.

    """

    open: bool = False
    input_grads: dict[int, Tensor] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raise if backward came here by another way than the call's outputs.

        Raises
        ------
        CaptureError
            As said.

        """
        if not self.open:
            raise CaptureError(
                f"backward reached {where} from a tensor inside of the module that the loss uses directly "
                "(kept by a hook or an attribute): under memory_budget only what the module returns may "
                "reach the loss. Return that tensor from forward, or leave memory_budget out."
            )


class RepeatableCall:
    """One call; see the module.

    Parameters
    ----------
    reached
        Called with this, within the loss's backward, when it has the gradients of the outputs; is to call
        `first`, or `only_to_inputs`.
    anchor
        A scalar that requires grad, to which the node leads.

    Attributes
    ----------
    gate
        For the nodes inside.

    """

    def __init__(self, reached: Callable[[RepeatableCall], None], anchor: Tensor) -> None:
        self.gate = Gate()
        self._reached = reached
        self._anchor = anchor
        self._entry = torch.zeros((), requires_grad=True)
        self._ended = False
        self._outputs: list[Tensor] = []
        self._grads: Sequence[Tensor | None] = ()
        self._devices: list[int] = []
        self._random: list[Tensor] = []  # the state of the CPU's generator, and of those of the devices

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `forward` returns, every tensor of it that requires grad behind the node.

        Raises
        ------
        CaptureError
            If an input that requires grad was written to: whoever uses it next would have a wrong gradient.

        """
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        inputs = [leaves[i] for i in places]
        versions = [t._version for t in inputs]
        if inputs:
            for n, i in enumerate(places):
                leaves[i] = _Entry.apply(self.gate, n, self._entry, leaves[i].detach())
            args, kwargs = tree_unflatten(leaves, structure)
        returned = forward(*args, **kwargs)
        if versions != [t._version for t in inputs]:
            raise CaptureError(
                "the module wrote to an input that requires grad, in place: under memory_budget its graph is "
                "apart from the input's. Give it a clone(), or leave memory_budget out."
            )
        leaves, structure = tree_flatten(returned)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places:
            return returned
        self._outputs = [leaves[i] for i in places]
        for i, outer in zip(places, _Exit.apply(self, self._anchor, *inputs), strict=True):
            leaves[i] = outer
        return tree_unflatten(leaves, structure)

    def end(self) -> None:
        """Let go of the graph: what the forward pass saved."""
        self._ended = True
        self._outputs, self._grads = [], ()
        self.gate.input_grads.clear()

    def outputs(self) -> list[Tensor]:
        """Return the outputs as the node sends them on."""
        return [out.detach() for out in self._outputs]  # no views: what follows may write to them in place

    def backward(self, grads: Sequence[Tensor | None], inputs: int) -> list[Tensor | None]:
        """From the outputs' gradients to the inputs'; part of the loss's backward.

        Raises
        ------
        CaptureError
            If the graph was let go of.

        """
        if self._ended:
            raise CaptureError(
                "backward ran a second time through the same forward pass: under memory_budget a module's "
                "graph goes with the first, also with retain_graph=True. Run the forward pass again, or "
                "leave memory_budget out."
            )
        self._grads = grads
        self._reached(self)
        return [self.gate.input_grads.get(n) for n in range(inputs)]

    def first(self) -> None:
        """Run the module's backward from the gradients that were reached, to every leaf; its graph stays."""
        self._devices, states = get_device_states(*self._outputs)
        self._random = [torch.get_rng_state(), *states]
        self._run(keep=True, inputs=None)

    def only_to_inputs(self) -> None:
        """Run the module's backward to its inputs alone, and let go of its graph."""
        self._run(keep=False, inputs=[self._entry])
        grads = dict(self.gate.input_grads)
        self.end()
        self.gate.input_grads.update(grads)

    def again(self, inputs: Sequence[Tensor], *, keep: bool) -> None:
        """Run it as the first time, with the same random numbers.

        Parameters
        ----------
        inputs
            Leaves to which the way is to be gone; nothing else that requires grad is given a gradient.
        keep
            Whether it can be run once more. If not, what forward saved is freed on the way.

        """
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._random[0])
            set_device_states(self._devices, self._random[1:])
            self._run(keep=keep, inputs=inputs)

    def _run(self, *, keep: bool, inputs: Sequence[Tensor] | None) -> None:
        ends = [(out, g) for out, g in zip(self._outputs, self._grads, strict=True) if g is not None]
        if not ends:
            return
        outs, grads = zip(*ends, strict=True)
        self.gate.open = True
        try:
            torch.autograd.backward(outs, grads, retain_graph=keep, inputs=inputs)
        finally:
            self.gate.open = False


class _Entry(torch.autograd.Function):
    """An input as it is."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, n: int, entry: Tensor, t: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gate, ctx.n = gate, n
        return t.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, None, None, None]:
        if g is not None:
            ctx.gate.check("the module's input")
            ctx.gate.input_grads[ctx.n] = g
        return None, None, None, None


class _Exit(torch.autograd.Function):
    """The outputs as they are."""

    @staticmethod
    def forward(ctx: Any, call: RepeatableCall, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.inputs, ctx.anchor = call, len(inputs), anchor
        return tuple(call.outputs())

    @staticmethod
    @differentiable_once(lambda ctx: [ctx.anchor])
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.call.backward(grads, ctx.inputs)
