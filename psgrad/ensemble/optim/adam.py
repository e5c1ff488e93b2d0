"""Adam and AdamW of K members at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from psgrad.ensemble.optim.base import Columns, EnsembleOptimizer
from psgrad.ensemble.optim.fused import changed_by_fused
from psgrad.ensemble.optim.per_member import PerMember, as_hyperparameter, numbers_of
from psgrad.ensemble.optim.rules import add_scaled, decayed
from psgrad.ensemble.optim.sgd import Values
from psgrad.errors import ConfigError

__all__ = ["Adam", "AdamW"]


class Adam(EnsembleOptimizer):
    """Adam: member k does what `torch.optim.Adam` with its settings would do alone.

    Parameters
    ----------
    params
        Stacked parameters `[K, ...]`, or groups of them.
    lr, weight_decay
        A number, or K of them.
    betas
        Two, each a number or K of them.
    eps, amsgrad
        As for `torch.optim.Adam`.

    Raises
    ------
    ConfigError
        As `EnsembleOptimizer`, or if `betas` are not two or `eps` is negative.

    """

    fused_on = ("cpu",)  # where the steps are
    _decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: Values = 1e-3,
        betas: tuple[Values, Values] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Values = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if not eps >= 0:
            raise ConfigError(f"eps must not be negative, got {eps!r}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
            },
        )

    def _values(self, group: dict[str, Any]) -> dict[str, Any]:
        betas, members = group["betas"], group["members"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigError(f"betas must be two, each a number or one a member, got {betas!r}")
        both = tuple(as_hyperparameter("betas", beta, members) for beta in betas)
        if not all(0 <= number < 1 for beta in both for number in numbers_of(beta)):
            raise ConfigError(f"betas must be in [0, 1), got {betas!r}")
        return {**super()._values(group), "betas": both}

    def _update(
        self,
        group: dict[str, Any],
        values: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        columns: Columns,
    ) -> None:
        states = [self._state_of(p, group["amsgrad"]) for p in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        if self._update_fused(group, values, parameters, grads, states):
            return
        by_age: dict[int, list[int]] = {}  # what had no gradient before is younger than the others
        for i, step in enumerate(steps):
            by_age.setdefault(int(step), []).append(i)
        for age, chosen in by_age.items():
            some = [parameters[i] for i in chosen]
            self._update_alike(group, values, some, [grads[i] for i in chosen], age)

    def _state_of(self, parameter: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
            state["step"] = torch.tensor(0.0)
            state.update({name: torch.zeros_like(parameter) for name in names})
        return state

    def _update_fused(
        self,
        group: dict[str, Any],
        values: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> bool:
        """Update by torch's fused kernel; False if that cannot be."""
        lr, (beta1, beta2), decay = values["lr"], values["betas"], values["weight_decay"]
        if any(isinstance(value, PerMember) for value in (lr, beta1, beta2, decay)):
            return False
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        largest = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        if not self._fits_fused(group, parameters, grads, first, second, largest):
            return False
        update = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
        update(
            parameters,
            grads,
            first,
            second,
            largest,
            [state["step"] for state in states],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=False,
        )
        changed_by_fused(parameters)
        return True

    def _update_alike(
        self,
        group: dict[str, Any],
        values: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        age: int,
    ) -> None:
        columns = Columns(parameters)
        lr, (beta1, beta2), decay = values["lr"], values["betas"], values["weight_decay"]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        if not self._decoupled:
            grads = decayed(grads, parameters, decay, columns)
        elif any(numbers_of(decay)):
            torch._foreach_mul_(parameters, columns(1 - lr * decay))

        # m = m + (1 - b1) (g - m), v = b2 v + (1 - b2) g^2
        torch._foreach_lerp_(first, grads, columns(1 - beta1))
        torch._foreach_mul_(second, columns(beta2))
        add_scaled(second, torch._foreach_mul(grads, grads), 1 - beta2, columns)
        if group["amsgrad"]:
            largest = [self.state[p]["max_exp_avg_sq"] for p in parameters]
            torch._foreach_maximum_(largest, second)
            second = largest

        # p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, columns((1 - beta2**age) ** 0.5))
        torch._foreach_add_(denominator, group["eps"])
        size = lr / (1 - beta1**age)
        if isinstance(size, PerMember):
            add_scaled(parameters, torch._foreach_div(first, denominator), -size, columns)
        else:
            torch._foreach_addcdiv_(parameters, first, denominator, value=-size)


class AdamW(Adam):
    """Adam with decoupled weight decay: member k does what `torch.optim.AdamW` would do alone.

    Parameters are those of `Adam`.
    """

    _decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: Values = 1e-3,
        betas: tuple[Values, Values] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Values = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)
