"""The loss of an ensemble of one: an ordinary forward pass on aliases of the stacked parameters.

Nothing is gained by taking the gradient before `backward`, as several members that run one after the other do
(`eager`). So autograd runs once, as for the member alone, and whatever autograd can do it does here: hooks,
accumulation, second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.ensemble.losses import scalar
from psgrad.ensemble.members import Slots, changed_settings, copy_settings, member_of
from psgrad.ensemble.randomness import MemberRandomness, snapshot

__all__ = ["SingleMember"]

Compute = Callable[[int], Tensor]
"""From a member's number to its loss."""


class SingleMember:
    """Computes losses of one member; remembers its parameters, and the modes it has found to work.

    A module that runs forward again in `backward` (`torch.utils.checkpoint`) finds the stacked parameters
    then, in which it is not the member. So the first loss of every mode is differentiated once for a trial.

    Parameters
    ----------
    stacked
        The module with stacked parameters, `[1, ...]`.

    """

    def __init__(self, stacked: nn.Module) -> None:
        self._stacked = stacked
        self._runs_again: dict[Hashable, bool] = {}
        self._aliases: _Aliases | None = None

    def loss(self, compute: Compute, randomness: MemberRandomness) -> Tensor | None:
        """`[1]`, the loss that `compute` gives with the member's parameters in their places.

        Parameters
        ----------
        compute
            Calls the module and the loss function, of member 0.
        randomness
            The member's random stream.

        Returns
        -------
        Tensor | None
            None if the module runs forward again in `backward`; all that it changed is as before.

        Raises
        ------
        ShapeError
            If it is no scalar.
        RuntimeError
            If the forward pass changes a trainable parameter in place, as autograd itself raises.

        """
        aliases = self._aliases
        if aliases is None or not aliases.hold():
            aliases = self._aliases = _Aliases(self._stacked)
        mode = tuple([module.training for module in aliases.slots.modules])
        found = self._runs_again.get(mode)
        if found is None:
            return self._first(mode, aliases, compute, randomness)
        return None if found else self._run(aliases, compute, randomness)

    def _run(self, aliases: _Aliases, compute: Compute, randomness: MemberRandomness) -> Tensor:
        self._aliases = None  # until they are seen to be what they were
        with aliases.held, randomness.of(0):
            loss = scalar(compute(0))
        if aliases.unrecorded():
            self._aliases = aliases
        return loss.unsqueeze(0)

    def _first(
        self, mode: Hashable, aliases: _Aliases, compute: Compute, randomness: MemberRandomness
    ) -> Tensor | None:
        restore, before = snapshot(self._stacked, randomness), member_of(self._stacked, 0)
        loss = self._run(aliases, compute, randomness)
        if not loss.requires_grad or not aliases.trained:
            return loss
        try:
            torch.autograd.grad(loss, aliases.trained, retain_graph=True, allow_unused=True)
        except Exception:  # of whatever runs in backward; members one after the other raise their own
            self._runs_again[mode] = True
            restore()
            if changed_settings(before, self._stacked):  # a step that forward counts
                _set_back(before, self._stacked)
            return None
        self._runs_again[mode] = False
        return loss

    def __reduce__(self) -> tuple[Any, ...]:
        return SingleMember, (self._stacked,)


def _set_back(before: nn.Module, module: nn.Module) -> None:
    copy_settings(before, module)
    for kept, own in zip(before.modules(), module.modules(), strict=True):
        for name in vars(own).keys() - vars(kept).keys():
            del own.__dict__[name]


_place, _strides, _kind = Tensor.data_ptr, Tensor.stride, attrgetter("shape", "requires_grad")


class _Aliases:
    """The stacked tensors without their axis of length 1: same storage, same version counter.

    They are made by one node of autograd's graph, which serves every loss until a tensor is another one: a
    view of each for each loss would cost a small model a tenth of its step.

    Attributes
    ----------
    slots
        Where they belong.
    held
        The block in which the module holds them.
    trained
        The aliases that a gradient comes to.

    """

    def __init__(self, stacked: nn.Module) -> None:
        self.slots = Slots(stacked)
        of = [t for t in self.slots.tensors if t.requires_grad]
        self.trained: tuple[Tensor, ...] = _Unstacked.apply(*of) if of else ()
        self._node = next((alias.grad_fn for alias in self.trained), None)
        parts = {t: _alias(t) for t in self.slots.tensors} | dict(zip(of, self.trained, strict=True))
        self.held = self.slots.holding(parts)
        self._others = [part for t, part in parts.items() if not t.requires_grad]
        # of a tensor whose alias lives, no other storage is at its address
        self._places = list(map(_place, self.slots.tensors))
        self._kinds = list(map(_kind, self.slots.tensors))
        self._orders = list(map(_strides, self.slots.tensors))

    def hold(self) -> bool:
        """Whether the module has the tensors still that they were made of."""
        tensors = self.slots.tensors
        return (
            self.slots.hold()
            and list(map(_place, tensors)) == self._places
            and list(map(_kind, tensors)) == self._kinds
            and list(map(_strides, tensors)) == self._orders
        )

    def unrecorded(self) -> bool:
        """Whether nothing that autograd records has changed one in place.

        Raises
        ------
        RuntimeError
            If a trainable one was changed so.

        """
        node = self._node
        if [alias for alias in self.trained if alias.grad_fn is not node]:
            raise RuntimeError(
                "forward changes a trainable parameter in place, which autograd refuses of a leaf: do it"
                " under torch.no_grad"
            )
        return not [alias for alias in self._others if alias.grad_fn is not None]


class _Unstacked(torch.autograd.Function):
    """`[1, ...]` to `[...]`, of many tensors at once."""

    @staticmethod
    def forward(ctx: Any, *stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple([_alias(t) for t in stacked])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple([None if g is None else g.unsqueeze(0) for g in grads])


def _alias(stacked: Tensor) -> Tensor:
    """`[1, ...]` to `[...]`; no view to autograd, which rebuilds a view's node at every change in place."""
    alias = stacked.detach()
    alias.data = alias.data.squeeze(0)
    return alias
