"""Members one after the other: what is always right, and what everything else is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from psgrad.ensemble.members import Slots
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.errors import MemberError

__all__ = ["call_members", "hold_members", "loop_members", "stacked_results"]


def stacked_results(results: Sequence[Any]) -> Any:
    """Stack K results alike, tensors or trees of them, to `[K, ...]`; what is no tensor is the same in all.

    Raises
    ------
    MemberError
        If members return different shapes, numbers or strings, or what may hold tensors and is no tree of
        them.

    """
    return tree_map(_stacked, *results)


def _stacked(*values: Any) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        shapes = [tuple(value.shape) for value in values]
        if len(set(shapes)) > 1:
            raise MemberError(
                f"members return tensors of different shapes, {', '.join(map(str, shapes))}, which cannot be"
                " stacked: use ens.loss with strategy='loop', whose loss function gets each member's own"
            )
        return torch.stack(values)
    if not isinstance(first, (*_SAME, type(None))):
        raise MemberError(
            f"a member returns a {type(first).__name__}, which cannot be stacked: return tensors, in tuples,"
            " lists or dicts, or use ens.loss, whose loss function gets what each member returns"
        )
    if any(type(value) is not type(first) or value != first for value in values):
        raise MemberError(
            f"members return different values that are no tensors, which cannot be stacked: {list(values)}."
            " Return them as tensors"
        )
    return first


_SAME = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def loop_members(run: Callable[[int], Any], members: int, randomness: MemberRandomness) -> list[Any]:
    """Return `run(k)` for every member, each under its own random stream."""
    results = []
    for k in range(members):
        with randomness.of(k):
            results.append(run(k))
    return results


def call_members(
    stacked: nn.Module,
    members: int,
    args_of: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    randomness: MemberRandomness,
) -> list[Any]:
    """Run a module with stacked parameters for every member; buffers that it updates are the member's own.

    Parameters
    ----------
    stacked
        Of `psgrad.ensemble.members.stack_members`, or a submodule of it.
    members
        K.
    args_of
        Member k's positional and keyword arguments.
    randomness
        The members' random streams.

    """

    def run(k: int) -> Any:
        args, kwargs = args_of(k)
        return stacked(*args, **kwargs)

    return hold_members(stacked, run, members, randomness)


def hold_members(
    stacked: nn.Module, run: Callable[[int], Any], members: int, randomness: MemberRandomness
) -> list[Any]:
    """Return `run(k)` for every member, the module being member k then, to autograd too.

    Buffers that are assigned anew get new memory at the end: a backward pass may need the old values.
    """
    slots = Slots(stacked)
    # unbind, not select: its backward stacks K gradients once, where K selects fill K times [K, ...]
    parts = {tensor: tensor.unbind() for tensor in slots.tensors}
    assigned: dict[Tensor, Tensor] = {}

    def held(k: int) -> Any:
        with slots.holding({tensor: part[k] for tensor, part in parts.items()}, assigned):
            return run(k)

    results = loop_members(held, members, randomness)
    for tensor, part in parts.items() if assigned else ():
        if any(own in assigned for own in part):
            tensor.data = torch.stack([assigned.get(own, own) for own in part])
    return results
