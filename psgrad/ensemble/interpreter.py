"""Run the graph of one member for all K: by rules, under `torch.vmap`, or member after member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from psgrad.ensemble.functions import FUNCTION_RULES, METHOD_RULES, is_fact
from psgrad.ensemble.layers import MODULE_RULES, Computed
from psgrad.ensemble.loop import call_members, loop_members
from psgrad.ensemble.plan import Step
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.ensemble.trace import is_in_place
from psgrad.ensemble.value import Value

__all__ = ["FoldedGraph", "RunLayer", "UnlikeError"]

RunLayer = Callable[[str, nn.Module, Sequence[Any], Callable[[nn.Module], Computed | str]], Computed | str]
"""Runs a layer: from its path, itself, its arguments, and what computes it, or one in its place, by rule."""


class UnlikeError(Exception):
    """A step gave members what cannot be joined: it depends on values, and may have been alike before."""


class FoldedGraph:
    """A member's graph, of `trace_member`, with the stacked parameters it is run with.

    Attributes
    ----------
    steps
        What the last run did, in order.
    uneven_channels
        A number of output channels of one member's convolution that is no multiple of 4, if there is one.
    elements
        How many elements a step of the last run gave one member, on average.
    growth
        The same of the first run for every element of its inputs, if it was found right; set from outside.
    refusal
        Why it is not to be used, if a run has shown that; set from outside.

    """

    def __init__(self, stacked: nn.Module, graph: fx.Graph, returned: TreeSpec, members: int) -> None:
        self.stacked = stacked
        self.graph = graph
        self.returned = returned
        self.members = members
        self.steps: list[Step] = []
        self.uneven_channels = _uneven_channels(stacked)
        self.growth: float | None = None
        self.refusal: str | None = None
        self._elements = 0
        self._parameters = sum(p.numel() for p in stacked.parameters()) / members
        self._looped: dict[fx.Node, str] = {}
        self._last_use = _last_uses(graph)

    @property
    def parameters(self) -> float:
        """How many parameters one member has for a step of the last run, on average."""
        return self._parameters / max(1, len(self.steps))

    @property
    def may_be_unlike(self) -> bool:
        """Whether a step may give members tensors of different sizes: what vmap can do does not."""
        return bool(self._looped)

    @property
    def elements(self) -> float:
        """See the class."""
        return self._elements / max(1, len(self.steps))

    def run(
        self, inputs: Sequence[Value], randomness: MemberRandomness, layers: RunLayer | None = None
    ) -> Any:
        """Every member's output, trees of `[K, ...]`; `layers` runs the layers, if not their rules."""
        self.steps, self._elements = [], 0
        values: dict[fx.Node, Any] = {}
        pending = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(pending)
            elif node.op == "get_attr":
                values[node] = Value.stacked(_attribute(self.stacked, node.target))
            elif node.op == "output":
                leaves = [tree_map(_stacked, leaf) for leaf in _filled(node.args[0], values)]
                return tree_unflatten(leaves, self.returned)
            else:
                changed = self._changed(node, values)
                result = values[node] = self._compute(node, values, randomness, layers)
                if isinstance(result, Value):
                    self._elements += result.shape.numel()
                if changed is not None:  # every name of that tensor gets the new value
                    values.update({name: result for name, value in values.items() if value is changed})
            for done in self._last_use.get(node, ()):
                values.pop(done, None)
        return None

    def _changed(self, node: fx.Node, values: dict[fx.Node, Any]) -> Value | Tensor | None:
        """What the node changes in place; None if nothing, or what is no tensor (`n += 1`)."""
        if not is_in_place(node, self.stacked):
            return None
        changed = values[node.args[0]]  # type: ignore[index]  # seen to when it was traced
        return changed if isinstance(changed, Value | Tensor) else None

    def _compute(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        randomness: MemberRandomness,
        layers: RunLayer | None,
    ) -> Any:
        args, kwargs = _filled(node.args, values), _filled(node.kwargs, values)
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Value)]
        if node.op == "call_module":
            module = self.stacked.get_submodule(node.target)  # type: ignore[arg-type]  # a path
            rule: Callable[..., Computed | str] | None = MODULE_RULES.get(type(module))

            def compute(layer: nn.Module) -> Computed | str:
                return _by_rule(rule, (layer, randomness, *args), kwargs)

            computed = compute(module) if layers is None else layers(str(node.target), module, args, compute)
            if isinstance(computed, Computed):
                return self._noted(node, type(module).__name__, computed)
            return self._one_by_one(node, type(module).__name__, module, args, kwargs, computed, randomness)
        function = _function(node)
        if not leaves or is_fact(node):
            args, kwargs = tree_map(_first_part, (args, kwargs))
            return function(*args, **kwargs)
        table: dict[Any, Callable[..., Computed | str]] = (
            FUNCTION_RULES if node.op == "call_function" else METHOD_RULES
        )
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
        computed = _by_rule(table.get(node.target), (randomness, *args), kwargs)
        if isinstance(computed, Computed):
            return self._noted(node, name, computed)
        if node not in self._looped:
            try:
                result = _under_vmap(function, args, kwargs)
            except Exception as error:  # a function that vmap cannot do; run alone it raises what is its own
                self._looped[node] = (
                    f"not under vmap: {str(error).splitlines()[0] if str(error) else error!r}"
                )
            else:
                self.steps.append(Step(node.name, name, "vmap", computed))
                return result
        return self._one_by_one(node, name, function, args, kwargs, self._looped[node], randomness)

    def _noted(self, node: fx.Node, kind: str, computed: Computed) -> Value:
        name = node.target if node.op == "call_module" else node.name
        self.steps.append(Step(str(name), kind, computed.strategy, computed.why))
        return computed.value

    def _one_by_one(
        self,
        node: fx.Node,
        kind: str,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        why: str,
        randomness: MemberRandomness,
    ) -> Any:
        self.steps.append(
            Step(str(node.target if node.op == "call_module" else node.name), kind, "loop", why)
        )
        leaves, spec = tree_flatten((args, kwargs))
        parts = [leaf.parts() if isinstance(leaf, Value) else (leaf,) * self.members for leaf in leaves]

        def args_of(k: int) -> Any:
            return tree_unflatten([part[k] for part in parts], spec)

        if isinstance(function, nn.Module):
            results = call_members(function, self.members, args_of, randomness)
        else:
            results = loop_members(lambda k: _called(function, args_of(k)), self.members, randomness)
        return tree_map(_joined, *results)


def _by_rule(rule: Callable[..., Computed | str] | None, args: Any, kwargs: Any) -> Computed | str:
    if rule is None:
        return "no rule"
    operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Value)]
    listed = any(isinstance(value, list | tuple) for value in args)
    if not operands and not listed:
        return "no tensor among its arguments"
    try:
        return rule(*args, **kwargs)
    except TypeError as error:  # arguments that the rule does not have
        return f"its rule does not take these arguments ({error})"


def _under_vmap(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Value)]
    tensors, dims = zip(*(leaves[i].for_vmap() for i in at), strict=True)
    if all(dim is None for dim in dims):  # under vmap something has to have a member axis
        first = leaves[at[0]]
        tensors, dims = (first.as_stacked(), *tensors[1:]), (0, *dims[1:])

    def member(*parts: Tensor) -> Any:
        filled = list(leaves)
        for i, part in zip(at, parts, strict=True):
            filled[i] = part
        return _called(function, tree_unflatten(filled, spec))

    return tree_map(Value.stacked, torch.vmap(member, dims, randomness="error")(*tensors))


def _called(function: Callable[..., Any], arguments: Any) -> Any:
    args, kwargs = arguments
    return function(*args, **kwargs)


def _function(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_function":
        return node.target  # type: ignore[return-value]  # a name
    return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)


def _filled(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(arguments, lambda node: values[node])


def _first_part(value: Any) -> Any:
    return value.parts()[0] if isinstance(value, Value) else value


def _stacked(value: Any) -> Any:
    return value.as_stacked() if isinstance(value, Value) else value


def _joined(*results: Any) -> Any:
    if isinstance(results[0], Tensor):
        shapes = [tuple(result.shape) for result in results]
        if len(set(shapes)) > 1:
            raise UnlikeError(f"members differ in the shape of a tensor: {', '.join(map(str, shapes))}")
        return Value.stacked(torch.stack(results))
    if any(result != results[0] for result in results):
        raise UnlikeError(f"members differ in what is no tensor: {results}")
    return results[0]


def _attribute(module: nn.Module, path: Any) -> Tensor:
    owner, _, name = str(path).rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _uneven_channels(stacked: nn.Module) -> int | None:
    convolutions = (m for m in stacked.modules() if isinstance(m, nn.modules.conv._ConvNd))
    return next((m.out_channels for m in convolutions if m.out_channels % 4), None)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Which values nobody needs after a node, so that memory is not held longer than by the member alone."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in (node, *node.all_input_nodes):
            last[used] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        ends.setdefault(node, []).append(used)
    return ends
