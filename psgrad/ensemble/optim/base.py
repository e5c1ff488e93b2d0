"""What the optimizers of an ensemble have in common: checks, members' columns, `keep`, state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from psgrad.ensemble.members import kept_members
from psgrad.ensemble.optim.fused import FusedFit
from psgrad.ensemble.optim.per_member import (
    Hyperparameter,
    PerMember,
    as_hyperparameter,
    numbers_of,
    simplest,
)
from psgrad.errors import ConfigError, MemberError

__all__ = ["Columns", "EnsembleOptimizer"]


class Columns:
    """Hyperparameters as factors of the parameters `[K, ...]` of one update: `[K, 1, ...]` where they differ.

    Parameters
    ----------
    parameters
        Whose shapes, dtypes and devices the factors have.

    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters

    def __call__(self, value: Hyperparameter) -> Any:
        """Return a float as it is; a `PerMember` as a list of a tensor for every parameter."""
        if not isinstance(value, PerMember):
            return value
        made: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        for p in self._parameters:
            key = p.ndim, p.dtype, p.device
            if key not in made:
                column = torch.tensor(value.values, dtype=p.dtype, device=p.device)
                made[key] = column.reshape(-1, *(1,) * (p.ndim - 1))
        return [made[p.ndim, p.dtype, p.device] for p in self._parameters]


class EnsembleOptimizer(Optimizer):
    """An optimizer over stacked parameters `[K, ...]`, one update for all K members.

    Every operation is elementwise, so no member's numbers reach another's: what is NaN in one stays there.

    Parameters
    ----------
    params
        Stacked parameters, or groups of them, as `torch.optim.Optimizer` takes them.
    defaults
        Hyperparameters; those of `ranges` are numbers, or K of them.

    Raises
    ------
    MemberError
        If the parameters are not all `[K, ...]` with one K.
    ConfigError
        If a hyperparameter is out of range, or has not one value or K.

    """

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"lr": (0.0, inf), "weight_decay": (0.0, inf)}
    """What may differ by member: least value, and first that is too large."""

    fused_on: ClassVar[tuple[str, ...]] = ()
    """Types of device on which one of torch's fused kernels does the update."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._fused_fits: dict[int, FusedFit] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused_fits = {}

    @property
    def members(self) -> int:
        """K, the number of members."""
        return self.param_groups[0]["members"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does.

        Raises
        ------
        MemberError, ConfigError
            As the class.

        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["members"] = self._members_of(group["params"])
            group.update(self._values(group))
        except Exception:
            self.param_groups.pop()
            raise

    def _members_of(self, parameters: Sequence[Tensor]) -> int:
        """K of a new group; every group has the same.

        Raises
        ------
        MemberError
            If the group's parameters are none, or not all `[K, ...]`.

        """
        if not parameters:
            raise MemberError("a group without parameters is of no ensemble")
        members = self.param_groups[0].get("members") or parameters[0].shape[:1].numel()
        for p in parameters:
            if not p.ndim or p.shape[0] != members or p.is_complex():
                raise MemberError(
                    f"parameters of {members} members are real and [K, ...] = [{members}, ...], as"
                    f" Ensemble.parameters() gives them; one is {p.dtype} of shape {tuple(p.shape)}"
                )
        return members

    def _values(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return what may differ by member as it stands in the group now, checked: a schedule may set it."""
        return {name: self._checked(name, group[name], group["members"]) for name in self.ranges}

    def _checked(self, name: str, value: Any, members: int) -> Hyperparameter:
        value = as_hyperparameter(name, value, members)
        least, most = self.ranges[name]
        for number in numbers_of(value):
            if not least <= number < most:
                raise ConfigError(f"{name} must be in [{least:g}, {most:g}), got {number!r}")
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or set them to zero."""
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:  # without what torch does for its profiler
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Raises
        ------
        MemberError
            If members were dropped from the ensemble and not here (or the other way round).
        ConfigError
            If a gradient is sparse, or a hyperparameter that was set since is out of range or has another
            number of values.

        """
        if (
            torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return self._hooked_step(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # the mark torch's own wrapper leaves
    """Torch does not wrap it: a record for a profiler that is off takes longer than a small update."""

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members, parameters, grads = group["members"], [], []
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                if p.shape[0] != members:
                    raise MemberError(
                        f"the ensemble has {p.shape[0]} members, its optimizer {members}: call keep with the"
                        " same indices on both"
                    )
                if grad.layout is not torch.strided:
                    raise ConfigError(f"a gradient is {grad.layout}: sparse ones are not supported")
                parameters.append(p)
                grads.append(grad)
            if parameters:
                values = {name: simplest(value) for name, value in self._values(group).items()}
                self._update(group, values, parameters, grads, Columns(parameters))
        return loss

    _hooked_step = Optimizer.profile_hook_step(_step)

    def _fits_fused(
        self,
        group: dict[str, Any],
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor],
        *states: Sequence[Tensor],
    ) -> bool:
        """Whether torch's fused kernel takes these tensors of a group."""
        fit = self._fused_fits.get(id(group))
        if fit is None:
            fit = self._fused_fits[id(group)] = FusedFit(*self.fused_on)
        return fit(parameters, grads, *states)

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        values: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        columns: Columns,
    ) -> None:
        """Update parameters in place; gradients stay as they are.

        Parameters
        ----------
        group
            With what is no member's own.
        values
            The hyperparameters that may differ by member, each a float, or a `PerMember` of several.
        parameters, grads
            `[K, ...]`, as many of one as of the other.
        columns
            Makes factors of hyperparameters.

        """

    def keep(self, indices: Sequence[int], *schedulers: LRScheduler) -> None:
        """Drop the state and the hyperparameters of every member but these, in this order.

        `Ensemble.keep` with the same indices does it for the parameters, before or after.

        Parameters
        ----------
        indices
            Of the members that stay.
        *schedulers
            Those of this optimizer: they remember first rates, which differ by member if rates do.

        Raises
        ------
        MemberError
            If there is none, one stands twice or does not exist.

        """
        kept = kept_members(indices, self.members)
        for state in self.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[name] = value[kept]
        for group in self.param_groups:
            group.update({name: _kept(value, kept) for name, value in group.items() if name != "params"})
            group["members"] = len(kept)
        for scheduler in schedulers:
            _kept(scheduler, kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state.

        Raises
        ------
        MemberError
            If it is of another number of members.

        """
        for group in state_dict["param_groups"]:
            if group.get("members") != self.members:
                raise MemberError(
                    f"the state is of {group.get('members', 'no')} members, the optimizer has {self.members}"
                )
        super().load_state_dict(state_dict)


def _kept(value: Any, indices: Sequence[int]) -> Any:
    """Return a setting without the members that go; a scheduler is changed in place."""
    if isinstance(value, PerMember):
        return value.kept(indices)
    if isinstance(value, LRScheduler):
        for name, setting in vars(value).items():
            setattr(value, name, _kept(setting, indices))
    elif isinstance(value, list | tuple):
        return type(value)(_kept(part, indices) for part in value)
    return value
