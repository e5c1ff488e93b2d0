"""A folded run of the ensemble whose layers are captured, all members' at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from psgrad.capture import Consumer
from psgrad.capture.captured_call import told
from psgrad.capture.recorder import ForwardCall, Recorder
from psgrad.capture.trial import other_numbers_of_samples
from psgrad.ensemble.execution import Execution, values_of
from psgrad.ensemble.interpreter import FoldedGraph
from psgrad.ensemble.layers import Computed
from psgrad.ensemble.members import with_tensors
from psgrad.ensemble.own import Arguments
from psgrad.ensemble.per_sample.use import MemberUse
from psgrad.ensemble.randomness import MemberRandomness, put_back_after
from psgrad.ensemble.value import Value
from psgrad.layers import rule_for

__all__ = ["FoldedCapture"]


class FoldedCapture:
    """Runs the layers of a folded graph so that `backward` hands over their contributions.

    Only where every trainable parameter belongs to a layer that has a rule for K members and one for
    per-sample gradients, and gets one row a row of the batch: `graph_for` tells.

    Parameters
    ----------
    stacked
        The module with stacked parameters.
    execution
        How it runs.
    consumer
        Is told of contributions to the stacked parameters.
    check
        Is called before a backward pass finishes.
    rows_per_sample
        As for `Capture`.

    """

    def __init__(
        self,
        stacked: nn.Module,
        execution: Execution,
        consumer: Consumer,
        check: Callable[[], None],
        rows_per_sample: int,
    ) -> None:
        self._stacked = stacked
        self._execution = execution
        self.anchor = torch.zeros((), requires_grad=True)
        """The leaf that every captured node leads to."""
        self._recorder = Recorder(consumer, check, self.anchor)
        self._rows_per_sample = rows_per_sample
        self._rows = 0
        self._known: WeakKeyDictionary[FoldedGraph, dict[Hashable, str | None]] = WeakKeyDictionary()

    def graph_for(
        self, inputs: Arguments, own: bool, members: int, randomness: MemberRandomness
    ) -> FoldedGraph | str:
        """The graph that runs these inputs folded and captured, or why members run one after the other.

        What is not known yet is found in a trial with these and with another number of samples, which leaves
        no trace: what does not grow with them is not the batch, whatever its length.
        """
        rows = _batch_rows(inputs, own)
        if not rows or rows % self._rows_per_sample:
            return f"{rows} rows"
        graph = self._execution.checked(inputs, own, members, randomness)
        if isinstance(graph, str):
            return graph
        values = values_of(inputs, own, members)
        key = own, tuple((v.shape[1:], v.tensor.dtype, v.shape[:1] == (rows,)) for v in values)
        known = self._known.setdefault(graph, {})
        if key not in known:
            known[key] = self._try(graph, inputs, own, rows, randomness)
        return known[key] or graph

    def _try(
        self, graph: FoldedGraph, inputs: Sequence[Tensor], own: bool, rows: int, randomness: MemberRandomness
    ) -> str | None:
        """Why this graph is not captured folded, found by running all and some samples; None if it is."""
        why = _uses_outside_layers(graph)
        if why is not None:
            return why
        batch_first = [x.movedim(1, 0) if own and x.ndim > 1 else x for x in inputs]
        some, _, some_rows = next(other_numbers_of_samples(batch_first, None, rows, self._rows_per_sample))
        some = [x.movedim(0, 1) if own and x.ndim > 1 else x for x in some]
        try:
            with torch.no_grad(), put_back_after(self._stacked, randomness):
                for batch, self._rows in ((inputs, rows), (some, some_rows)):
                    graph.run(values_of(batch, own, graph.members), randomness, self._run_layer)
        except Exception as error:  # whatever a model may raise on another number of samples
            return str(error).splitlines()[0] if str(error) else repr(error)
        return None

    def run(
        self, graph: FoldedGraph, inputs: Sequence[Tensor], own: bool, randomness: MemberRandomness
    ) -> Any:
        """Every member's output, trees of `[K, ...]`."""
        self._recorder.forget_failed()
        values = values_of(inputs, own, graph.members)
        self._rows = _batch_rows(inputs, own)
        return self._execution.run_folded(graph, values, randomness, self._run_layer)

    def _run_layer(
        self,
        path: str,
        layer: nn.Module,
        args: Sequence[Any],
        compute: Callable[[nn.Module], Computed | str],
    ) -> Computed | str:
        """Run a layer by its rule, captured if it has anything to train.

        Raises
        ------
        _NotCapturedError
            If it has no rule that fits.

        """
        if not any(p.requires_grad for p in layer.parameters()):
            return compute(layer)
        rule = rule_for(layer)
        if rule is None or not args or not isinstance(args[0], Value):
            raise _NotCapturedError(path, layer, "its per-sample gradients have no rule")
        x: Value = args[0]
        why = rule.input_error(layer, torch.empty(x.shape, device="meta"))
        computed = compute(with_tensors(layer, Tensor.detach, _same)) if why is None else why
        if isinstance(computed, str):
            raise _NotCapturedError(path, layer, computed)
        out = computed.value
        if x.shape[0] != self._rows or out.shape[:1] != (self._rows,):
            raise _NotCapturedError(
                path, layer, f"it is called with {x.shape[0]} rows, the batch has {self._rows}"
            )
        wanted = tuple(n for n, p in layer._parameters.items() if p is not None and p.requires_grad)

        members, x_layout, layout = x.members, x.layout, out.layout  # no tensor: autograd holds them

        this = ForwardCall()

        def record(x: Tensor, g: Tensor) -> None:
            pair = Value(x, x_layout, members), Value(g, layout, members)
            use = MemberUse(path, rule, layer, *pair, self._rows_per_sample, wanted)
            self._recorder.record(use, this)

        tensor = told(record, path, self.anchor, x.tensor, out.tensor)
        return Computed(Value(tensor, layout, members), computed.strategy, computed.why)


def _batch_rows(inputs: Sequence[Any], own: bool) -> int:
    """How many rows a member's batch has: those of its first tensor with any."""
    axis = 1 if own else 0
    return next((x.shape[axis] for x in inputs if isinstance(x, Tensor) and x.ndim > axis), 0)


def _same(t: Tensor) -> Tensor:
    return t


def _uses_outside_layers(graph: FoldedGraph) -> str | None:
    """Which trainable parameter the graph uses outside of a layer; None if none."""
    trainable = {
        name for name, p in graph.stacked.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in trainable:
            return f"the parameter {node.target} is used outside of the layers that have a rule"
    return None


class _NotCapturedError(Exception):
    def __init__(self, path: str, layer: nn.Module, why: str) -> None:
        super().__init__(f"{path} ({type(layer).__name__}): {why}")
