"""What a member's forward pass must not do, found by running one alone before members share a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from psgrad.ensemble.members import changed_settings, member_of, tensors_of
from psgrad.ensemble.own import Arguments
from psgrad.ensemble.randomness import GlobalStates, given_back
from psgrad.ensemble.trace import settings_key
from psgrad.errors import MemberError
from psgrad.graph import nodes_of

__all__ = ["refuse_changed", "refuse_leaks", "versions"]


def refuse_leaks(stacked: nn.Module, inputs: Arguments, own: bool) -> None:
    """Run a copy of member 0 and raise if its forward pass leaves anything that others would find.

    Raises
    ------
    MemberError
        If it sets plain attributes, makes buffers, changes its inputs in place, or runs again in backward.

    """
    member = member_of(stacked, 0)
    before, settings, states = versions(inputs), settings_key(stacked), GlobalStates()
    try:
        with given_back(), saved_tensors_hooks(Tensor.detach, lambda t: t):
            returned = inputs.of(0, own).given_to(member)
    finally:
        states.put_back()
    outputs = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
    if any(getattr(node, "_forward_cls", None) is CheckpointFunction for node in nodes_of(outputs)):
        raise MemberError(
            "forward is checkpointed with use_reentrant=True, which would run it again in backward, where the"
            " parameters are no member's: say use_reentrant=False, and use ens.loss"
        )
    refuse_changed(before, inputs)
    made = set(tensors_of(member)) ^ set(tensors_of(stacked))
    if made:
        raise MemberError(
            f"forward makes or removes {', '.join(sorted(made))}: register it as a tensor of its shape in"
            " __init__, and change it in place"
        )
    if settings_key(stacked) != settings:
        raise MemberError(
            "forward changes an object that copies of the module share, which every member would find as the"
            " one before left it: keep state in a registered buffer and change it in place"
        )
    changed = changed_settings(stacked, member)
    if changed:
        raise MemberError(
            f"forward changes the plain attribute {', '.join(changed)}, which every member would find as the"
            " one before left it: keep state in a registered buffer and change it in place, or return it"
        )


def versions(values: Sequence[Any]) -> list[int]:
    """Return how often every tensor, or tensor of a tree, was changed in place."""
    return [
        leaf._version
        for value in values
        for leaf in ((value,) if isinstance(value, Tensor) else tree_leaves(value))
        if isinstance(leaf, Tensor) and not leaf.is_inference()  # which has no version
    ]


def refuse_changed(before: Sequence[int], values: Sequence[Any]) -> None:
    """Raise if a tensor, or one of a tree, was changed in place since.

    Raises
    ------
    MemberError
        As said.

    """
    if versions(values) != before:
        raise MemberError(
            "forward, or the loss, changes an input or a target in place, which the next member would get:"
            " clone it before (x = x.clone())"
        )
