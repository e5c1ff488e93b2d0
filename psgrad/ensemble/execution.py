"""Choose how an ensemble runs, folded or member after member, and check the folded run before it is used."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.ensemble.alone import refuse_changed, refuse_leaks, versions
from psgrad.ensemble.check import check_against_alone
from psgrad.ensemble.interpreter import FoldedGraph, RunLayer, UnlikeError
from psgrad.ensemble.loop import call_members, stacked_results
from psgrad.ensemble.own import Arguments
from psgrad.ensemble.plan import EnsemblePlan, Step
from psgrad.ensemble.randomness import GlobalStates, MemberRandomness, put_back_after, snapshot
from psgrad.ensemble.trace import settings_key, trace_key, trace_member
from psgrad.ensemble.value import Value

__all__ = ["Execution", "values_of"]

_FOLDED_ELEMENTS = 85_000
"""On the CPU, the largest mean output of a step and member for which folding wins. What folding saves is
K - 1 calls a step; what it costs is that grouped kernels and folded tensors use the caches worse, by element.
On two cores, with twelve small CNNs, 4 and 16 members, the curves cross between 90,000 and 190,000."""

_UNEVEN_ELEMENTS = 30_000
"""The same where a convolution's channels of one member do not fill the vectors of grouped kernels evenly:
LeNet's 6, or 10 and 50. Those curves cross between 20,000 and 90,000."""

_CAPTURED_ELEMENTS = 200_000
"""The same where per-sample gradients are captured, which makes every call cost more: those curves cross
between 180,000, with 16 members, and 570,000, with 4."""


_FOLDED_PARAMETERS = 100_000
"""On the CPU, the largest mean number of parameters a step and member for which folding wins: grouped
convolutions and batched products of large weights are slower than as many single ones. Measured with layers
of 64 to 1024 channels, 4 and 16 members: at 77,000 folding takes 0.8 of the loop's time, at 130,000 0.8 to
1.5 of it, at 300,000 three times it."""

_MOST_SETTINGS = 8
"""Graphs that are kept of a module in one mode, for one kind of inputs: one a state of its settings."""

_MOST_KINDS = 32
"""Modes and kinds of inputs of which graphs are kept."""

_CHANGING = (
    f"its settings change from step to step: {_MOST_SETTINGS} graphs were made, and each serves one state of"
    " them. A buffer in place of the setting needs one graph, strategy='folded' makes one every time"
)

_DRAWS = "forward draws random numbers from sizes alone, which a folded run would do once for all members"


class Execution:
    """Runs a stacked module; remembers graphs by mode, and what each was found to be.

    Parameters
    ----------
    stacked
        The module with stacked parameters.
    strategy
        "auto": folded where that is right and estimated to be faster; "folded": wherever it is right;
        "loop": never.

    """

    def __init__(self, stacked: nn.Module, strategy: str) -> None:
        self.stacked = stacked
        self.strategy = strategy
        self._graphs: dict[Hashable, dict[Hashable, FoldedGraph | str]] = {}  # by all else, by settings
        self._last: EnsemblePlan | tuple[int, str] | None = None  # a plan, or what one is made from

    @property
    def last_plan(self) -> EnsemblePlan | None:
        """How the last call ran."""
        if isinstance(self._last, tuple):
            members, why = self._last
            self._last = EnsemblePlan(members, self._whole(why), why)
        return self._last

    def _graph(self, inputs: Arguments, own: bool, members: int) -> FoldedGraph | str:
        """The graph of these inputs, which may still have to be checked, or why there is none.

        Raises
        ------
        MemberError
            If what a member's forward pass leaves behind would reach the next member.

        """
        if members == 1 and self.strategy != "folded":
            return "asked for" if self.strategy == "loop" else "one member: there is nothing to fold"
        key, settings = self._key(inputs, own, members)
        known = self._graphs.get(key, {})
        if settings not in known:
            if len(known) == _MOST_SETTINGS and self.strategy != "folded":
                last = known[next(reversed(known))]
                return last if isinstance(last, str) else last.refusal or _CHANGING
            refuse_leaks(self.stacked, inputs, own)
            known[settings] = self._new_graph(inputs, members)
            self._graphs[key] = known
            for kept, most in ((known, _MOST_SETTINGS), (self._graphs, _MOST_KINDS)):
                if len(kept) > most:
                    del kept[next(iter(kept))]
        found = known[settings]
        return found if isinstance(found, str) else found.refusal or found

    def _not_now(
        self, graph: FoldedGraph, inputs: Arguments, own: bool, most: int | None = None
    ) -> str | None:
        """Why these inputs do not run by a graph; None if they do, or if that is still to be checked."""
        values = values_of(inputs, own, graph.members)
        if graph.growth is not None:
            return self._slower(graph, values, most)
        # The graph is checked by its first run, and anything agrees on nothing.
        if any(not value.shape.numel() for value in values):
            return "no sample yet to check a folded run by"
        return None

    def _new_graph(self, inputs: Arguments, members: int) -> FoldedGraph | str:
        if self.strategy == "loop":
            return "asked for"
        if inputs.names:
            return f"{', '.join(inputs.names)} cannot be given by position"
        if not all(isinstance(value, Tensor) for value in inputs):
            return "an input is no tensor"
        traced = trace_member(self.stacked, len(inputs))
        return traced if isinstance(traced, str) else FoldedGraph(self.stacked, *traced, members)

    def checked(
        self, inputs: Arguments, own: bool, members: int, randomness: MemberRandomness
    ) -> FoldedGraph | str:
        """The graph by which these inputs run captured, or why they do not; a new one is checked before."""
        return self._checked(inputs, own, members, randomness, _CAPTURED_ELEMENTS)

    def settled(self, inputs: Arguments, own: bool, members: int, randomness: MemberRandomness) -> str | None:
        """Why these inputs run member after member, or None; as `checked`, uncaptured."""
        found = self._checked(inputs, own, members, randomness, None)
        return found if isinstance(found, str) else None

    def _checked(
        self, inputs: Arguments, own: bool, members: int, randomness: MemberRandomness, most: int | None
    ) -> FoldedGraph | str:
        graph = self._graph(inputs, own, members)
        if isinstance(graph, str):
            return graph
        why = self._not_now(graph, inputs, own, most)
        if why is None and graph.growth is None:
            with put_back_after(self.stacked, randomness):
                self._first(graph, inputs, own, randomness)
            why = graph.refusal or self._not_now(graph, inputs, own, most)
        return why or graph

    def run_folded(
        self,
        graph: FoldedGraph,
        values: Sequence[Value],
        randomness: MemberRandomness,
        layers: RunLayer | None,
    ) -> Any:
        """Every member's output, by a graph of `checked`.

        Raises
        ------
        UnlikeError
            If members differ in more than values: the graph is refused from then on, and nothing was done.

        """
        restore = snapshot(self.stacked, randomness) if graph.may_be_unlike else None
        try:
            result = graph.run(values, randomness, layers)
        except UnlikeError as error:
            if restore is not None:
                restore()
            graph.refusal = str(error)
            raise
        self._last = EnsemblePlan(graph.members, tuple(graph.steps), None)
        return result

    def note_loop(self, members: int, why: str) -> None:
        """Remember that a call ran member after member."""
        self._last = members, why

    def run(self, inputs: Arguments, own: bool, members: int, randomness: MemberRandomness) -> Any:
        """Every member's output, trees of `[K, ...]`."""
        graph = self._graph(inputs, own, members)
        why = graph if isinstance(graph, str) else self._not_now(graph, inputs, own)
        if isinstance(graph, FoldedGraph) and why is None:
            result = None
            if graph.growth is None:
                result = self._first(graph, inputs, own, randomness)
            else:
                with suppress(UnlikeError):
                    result = self.run_folded(graph, values_of(inputs, own, members), randomness, None)
            why = graph.refusal
            if why is None:
                return result
        assert why is not None
        return self._loop(inputs, own, members, randomness, why)

    def _key(self, inputs: Arguments, own: bool, members: int) -> tuple[Hashable, Hashable]:
        """What a graph, and that it was found right, depends on: settings, behind all else."""
        if self.strategy == "loop":  # there is no graph
            types = tuple(map(type, inputs))
            return (inputs.names, types, members, torch.is_grad_enabled(), self.stacked.training), None
        kinds = tuple(map(_kind, inputs))
        return (inputs.names, kinds, own, members, trace_key(self.stacked)), settings_key(self.stacked)

    def _first(
        self, graph: FoldedGraph, inputs: Sequence[Tensor], own: bool, randomness: MemberRandomness
    ) -> Any:
        """Run a new graph, and members alone beside it: its result, or None if it says why it is refused."""
        members, values = graph.members, values_of(inputs, own, graph.members)
        buffers = {name: b.detach().clone() for name, b in self.stacked.named_buffers()}
        states, outside = list(randomness.states), GlobalStates()
        try:
            result = graph.run(values, randomness)
        except Exception as error:  # the member alone fails as well, or the graph was not what runs alone
            outside.put_back()
            found: str | None = f"folded, it raises {error!r}"
        else:
            drew = outside.put_back()
            alone = self.stacked, members, inputs, own, result, buffers, states
            found = _DRAWS if drew else check_against_alone(*alone)
        if found is None:
            graph.growth = graph.elements / max(1, _elements(values))
            slower = self._slower(graph, values)  # from the next call on; this one is done
            steps = tuple(graph.steps) if slower is None else self._whole(slower)
            self._last = EnsemblePlan(members, steps, slower)
            return result
        with torch.no_grad():
            for name, buffer in self.stacked.named_buffers():
                buffer.copy_(buffers[name])
        randomness.set_states(states)
        graph.refusal = found
        return None

    def _slower(self, graph: FoldedGraph, values: Sequence[Value], most: int | None = None) -> str | None:
        """Why members one after the other are estimated to be faster; None if they are not.

        Pure: from the shapes alone. A step's size grows with the input, in proportion to the first run's. At
        `most` so many elements a step and member are folded; without it, as many as uncaptured runs should.
        """
        on_cpu = all(value.tensor.device.type == "cpu" for value in values)
        if self.strategy == "folded" or not on_cpu:
            return None
        parameters = graph.parameters
        if parameters > _FOLDED_PARAMETERS:
            return (
                f"{parameters:,.0f} parameters a step and member; on the CPU folding wins to"
                f" {_FOLDED_PARAMETERS:,}"
            )
        assert graph.growth is not None
        elements = graph.growth * _elements(values)
        why = ""
        if most is None:
            uneven = graph.uneven_channels
            most = _FOLDED_ELEMENTS if uneven is None else _UNEVEN_ELEMENTS
            why = "" if uneven is None else f" with {uneven} channels"
        if elements <= most:
            return None
        return f"{elements:,.0f} elements a step and member; on the CPU folding wins to {most:,}{why}"

    def _whole(self, why: str) -> tuple[Step, ...]:
        return (Step("", type(self.stacked).__name__, "loop", why),)

    def _loop(
        self, inputs: Arguments, own: bool, members: int, randomness: MemberRandomness, why: str
    ) -> Any:
        self.note_loop(members, why)
        before = versions(inputs)
        results = call_members(self.stacked, members, lambda k: inputs.of(k, own).split(), randomness)
        if members > 1:
            refuse_changed(before, inputs)
        return stacked_results(results)

    def __reduce__(self) -> tuple[Any, ...]:
        return Execution, (self.stacked, self.strategy)


def _kind(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return type(value), value.ndim, value.dtype, value.requires_grad
    return (type(value),)


def _elements(values: Sequence[Value]) -> int:
    """How many input elements one member sees."""
    return sum(value.shape.numel() for value in values)


def values_of(inputs: Sequence[Tensor], own: bool, members: int) -> list[Value]:
    """Return the values that a graph is run with."""
    return [Value.stacked(x) if own else Value.shared(x, members) for x in inputs]
