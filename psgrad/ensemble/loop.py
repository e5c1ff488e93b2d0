"""Members one after the other: what is always right, and what everything else is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from psgrad.ensemble.members import tensors_of
from psgrad.ensemble.randomness import MemberRandomness

__all__ = ["call_members", "loop_members", "stacked_results"]


def stacked_results(results: Sequence[Any]) -> Any:
    """Stack K results alike, tensors or trees of them, to `[K, ...]`; what is no tensor is the first one."""
    return tree_map(
        lambda *values: torch.stack(values) if isinstance(values[0], Tensor) else values[0], *results
    )


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
    # unbind, not select: its backward stacks K gradients once, where K selects fill K times [K, ...]
    parts = {name: tensor.unbind() for name, tensor in tensors_of(stacked).items()}

    def run(k: int) -> Any:
        args, kwargs = args_of(k)
        return functional_call(stacked, {name: part[k] for name, part in parts.items()}, args, kwargs)

    return loop_members(run, members, randomness)
