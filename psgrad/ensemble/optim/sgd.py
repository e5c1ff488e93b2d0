"""SGD of K members at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from psgrad.ensemble.optim.base import Columns, EnsembleOptimizer
from psgrad.ensemble.optim.fused import changed_by_fused
from psgrad.ensemble.optim.per_member import Hyperparameter, PerMember, numbers_of
from psgrad.ensemble.optim.rules import add_scaled, decayed
from psgrad.errors import ConfigError

__all__ = ["SGD"]

Values = float | Sequence[float] | Tensor | PerMember


class SGD(EnsembleOptimizer):
    """Stochastic gradient descent: member k does what `torch.optim.SGD` with its settings would do alone.

    Parameters
    ----------
    params
        Stacked parameters `[K, ...]`, or groups of them.
    lr, momentum, weight_decay
        A number, or K of them.
    dampening, nesterov
        As for `torch.optim.SGD`.

    Raises
    ------
    ConfigError
        As `EnsembleOptimizer`, or if `nesterov` goes with dampening or a member without momentum.

    """

    fused_on = ("cpu", "cuda")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {**EnsembleOptimizer.ranges, "momentum": (0.0, inf)}

    def __init__(
        self,
        params: Iterable[Any],
        lr: Values = 1e-3,
        momentum: Values = 0.0,
        dampening: float = 0.0,
        weight_decay: Values = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
        )

    def _values(self, group: dict[str, Any]) -> dict[str, Any]:
        values = super()._values(group)
        if group["nesterov"] and (group["dampening"] != 0 or min(numbers_of(values["momentum"])) == 0):
            raise ConfigError("nesterov needs momentum in every member, and no dampening")
        return values

    def _update(
        self,
        group: dict[str, Any],
        values: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        columns: Columns,
    ) -> None:
        if self._update_fused(group, values, parameters, grads):
            return
        grads = decayed(grads, parameters, values["weight_decay"], columns)
        momentum = values["momentum"]
        if any(numbers_of(momentum)):
            buffers = self._buffers(group, momentum, parameters, grads)
            if group["nesterov"]:
                # g + m * b
                looked = torch._foreach_mul(buffers, columns(momentum))
                torch._foreach_add_(looked, grads)
                grads = list(looked)
            else:
                grads = buffers
        add_scaled(parameters, grads, -values["lr"], columns)

    def _update_fused(
        self, group: dict[str, Any], values: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]
    ) -> bool:
        """Update by torch's fused kernel; False if that cannot be, or a buffer is to be made."""
        momentum = values["momentum"]
        if [value for value in values.values() if isinstance(value, PerMember)]:
            return False
        buffers = [self.state[p].get("momentum_buffer") for p in parameters] if momentum else []
        if [b for b in buffers if b is None] or not self._fits_fused(group, parameters, grads, buffers):
            return False
        torch._fused_sgd_(
            parameters,
            grads,
            buffers,
            weight_decay=values["weight_decay"],
            momentum=momentum,
            lr=values["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,
        )
        changed_by_fused(parameters)
        return True

    def _buffers(
        self,
        group: dict[str, Any],
        momentum: Hyperparameter,
        parameters: list[Tensor],
        grads: list[Tensor],
    ) -> list[Tensor]:
        """Momentum buffers: b = m * b + (1 - dampening) * g; the first time b = g."""
        old = [i for i, p in enumerate(parameters) if "momentum_buffer" in self.state[p]]
        for i in set(range(len(parameters))) - set(old):
            self.state[parameters[i]]["momentum_buffer"] = grads[i].clone()
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        if old:
            some, those = [buffers[i] for i in old], [grads[i] for i in old]
            columns = Columns(some)
            torch._foreach_mul_(some, columns(momentum))
            undampened: Hyperparameter = 1 - group["dampening"]
            if isinstance(momentum, PerMember):  # a member without momentum has no buffer to dampen
                undampened = momentum.map(lambda m: 1 - group["dampening"] if m else 1.0)
            add_scaled(some, those, undampened, columns)
        return buffers
