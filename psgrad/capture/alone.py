"""What a module computes of its parameters alone: once for all, and of every sample's copies where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psgrad.capture.computed import Made, Operand, saved_as_they_are

__all__ = ["OfParameters"]


@dataclass(frozen=True, eq=False)
class _Step:
    """One function of parameters, of what was computed of them before, and of constants."""

    run: Callable[..., Any]
    of: Sequence[Tensor]
    parameters: frozenset[nn.Parameter]
    constants: Sequence[Tensor]
    versions: Sequence[int]
    recorded: bool
    results: list[Tensor] = field(default_factory=list)


class OfParameters:
    """Values that are the same for every sample, though each sample has its own gradient of them.

    A value is a parameter; or a tensor that was computed of parameters as they are, whose graph ends in
    leaves that stand for them; or one of which there are the samples' copies and nothing else.

    Parameters
    ----------
    own_copies
        Returns every sample's copy of a parameter, `[N, *shape]`.

    """

    def __init__(self, own_copies: Callable[[nn.Parameter], Tensor]) -> None:
        self._own_copies = own_copies
        self._leaves: dict[nn.Parameter, Tensor] = {}
        self._steps: dict[Tensor, _Step] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._rearranged: set[Tensor] = set()  # of a parameter, those that have its elements in another order

    def of_copies(self, copies: Tensor) -> Tensor:
        """Return a value, without numbers, of which there are these copies `[N, *shape]`."""
        value = copies.new_empty(()).expand(copies.shape[1:]).requires_grad_(copies.requires_grad)
        self._copies[value] = copies
        return value

    def run(
        self,
        function: Callable[..., Any],
        of: Sequence[Tensor],
        constants: Sequence[Tensor],
        *,
        rearranges: bool = False,
    ) -> Any:
        """Return what a function computes of values; tensors of the result are values again.

        Parameters
        ----------
        function
            Of `of`.
        of
            Values.
        constants
            Other tensors that it uses.
        rearranges
            Whether it is one of `psgrad.capture.stand_in.REARRANGING`.

        Raises
        ------
        Exception
            Whatever the function raises; where there are copies only, under `torch.vmap`.

        """
        known = [value for value in of if isinstance(value, nn.Parameter) or value in self._steps]
        if len(known) < len(of):
            return tree_map(self.of_copies, torch.vmap(function)(*map(self.copies, of)))
        as_they_are = [self._leaf(v) if isinstance(v, nn.Parameter) else v for v in of]
        with saved_as_they_are():
            out = function(*as_they_are)
        parameters = frozenset(
            p for v in of for p in ([v] if isinstance(v, nn.Parameter) else self._steps[v].parameters)
        )
        step = _Step(function, of, parameters, constants, _versions(constants), torch.is_grad_enabled())

        def noted(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            given = [value for value, t in zip(of, as_they_are, strict=True) if t is result]
            value = given[0] if given else result  # `p.contiguous()` is p
            if not given:
                self._steps[value] = step
                if rearranges and value.dtype == of[0].dtype and self._has_order_only(of[0]):
                    self._rearranged.add(value)
            step.results.append(value)
            return value

        return tree_map(noted, out)

    def copies(self, value: Tensor) -> Tensor:
        """Return every sample's copy, `[N, *shape]`.

        Raises
        ------
        RuntimeError
            If it was computed with a constant that has been written to since.
        Exception
            Whatever `torch.vmap` raises of what it was computed by.

        """
        if value not in self._copies:
            step = self._steps.get(value)
            if step is None:
                assert isinstance(value, nn.Parameter)
                self._copies[value] = self._own_copies(value)
            else:
                self._copy_results(step)
        return self._copies[value]

    def _copy_results(self, step: _Step) -> None:
        if _versions(step.constants) != step.versions:
            raise RuntimeError("a tensor that it was computed with has been written to since")
        with torch.set_grad_enabled(step.recorded):
            copies = torch.vmap(step.run)(*map(self.copies, step.of))
        for value, own in zip(step.results, tree_leaves(copies), strict=True):
            self._copies.setdefault(value, own)

    def operand(self, value: Tensor) -> Operand:
        """Return what a layer's rule takes for a weight of this value; None if there are copies only."""
        if isinstance(value, nn.Parameter):
            return value
        step = self._steps.get(value)
        if step is None:
            return None
        if not value.requires_grad:
            return nn.Parameter(value.detach(), requires_grad=False)
        return Made(value, {p: self._leaf(p) for p in step.parameters}, value in self._rearranged)

    def _has_order_only(self, value: Tensor) -> bool:
        return isinstance(value, nn.Parameter) or value in self._rearranged

    def _leaf(self, p: nn.Parameter) -> Tensor:
        if p not in self._leaves:
            self._leaves[p] = p.detach().requires_grad_()
        return self._leaves[p]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]
