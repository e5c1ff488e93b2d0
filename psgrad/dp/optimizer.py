"""`PrivateOptimizer`: clipped sums in, noise, a constant divisor, one accounted step out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.accountants.accountant import IAccountant
from torch import Tensor, nn

from psgrad.clipping import ClipPerSample
from psgrad.dp.noise import add_gaussian_noise, noise_generator
from psgrad.errors import ConfigError

__all__ = ["PrivateOptimizer"]


class PrivateOptimizer(torch.optim.Optimizer):
    """One logical step of DP-SGD (Abadi et al. 2016) around any `torch.optim` optimizer.

    It is an optimizer itself: its parameter groups and state are those of the one inside, so that
    learning-rate schedulers take it, and it has the attributes that Opacus's schedulers and its
    `BatchMemoryManager` use.

    Parameters
    ----------
    optimizer
        Over trainable parameters of the module that `clip` is attached to, and no others.
    clip
        From `clip_per_sample(module, max_norm, "sum")`, in any style. Several backward passes may come
        before a step: their clipped sums add up.
    noise_multiplier
        Standard deviation of the noise in units of the clipped sum's sensitivity, `clip.l2_bound`.
    expected_batch_size
        q times the number of samples, a constant: what the noisy sum is divided by. The size of the
        batch that was drawn is private and never used.
    accountant
        Is told of every step.
    sample_rate
        q, for the accountant.
    generator
        For the noise; None to make one with `noise_generator`.
    divisor
        What the noisy sum is divided by instead, another constant.

    Guarantees
    ----------
    Each `step()` draws noise once for every trainable parameter, used or not, and records one step with
    the accountant before the weights move. No step moves a parameter whose gradient was not clipped, and a
    step without a backward pass since the last raises; for an empty batch there is `step_empty()`, though a
    backward pass over no rows does as well.

    Raises
    ------
    ConfigError
        If the clip handle does not sum, a number is out of range, or the optimizer holds other
        parameters than those that are clipped.

    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip: ClipPerSample,
        *,
        noise_multiplier: float,
        expected_batch_size: float,
        accountant: IAccountant,
        sample_rate: float,
        generator: torch.Generator | None = None,
        divisor: float | None = None,
    ) -> None:
        if not clip.into_sum:
            raise ConfigError('private steps add up clipped sums: clip with loss_reduction="sum"')
        if not expected_batch_size > 0:
            raise ConfigError(f"expected_batch_size must be positive, got {expected_batch_size}")
        if not noise_multiplier >= 0:
            raise ConfigError(f"noise_multiplier must be 0 or more, got {noise_multiplier}")
        # Not torch's own __init__: groups, state and hooks are the inner optimizer's.
        self.original_optimizer = optimizer
        self.clip = clip
        self.parameters: list[nn.Parameter] = list(clip.trainable.values())
        self._check_clipped([p for group in optimizer.param_groups for p in group["params"]])
        self.noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self._divisor = expected_batch_size if divisor is None else divisor
        self.accountant = accountant
        self.sample_rate = sample_rate
        self.generator = generator or noise_generator(self.parameters[0].device)
        self._physical: list[bool] = []
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._cleared = 0  # backward passes whose gradients were thrown away
        self._hooks: list[Callable[[PrivateOptimizer], None]] = []

    def _check_clipped(self, parameters: list[nn.Parameter]) -> None:
        clipped = set(self.parameters)
        strangers = [p for p in parameters if p.requires_grad and p not in clipped]
        if strangers:
            shapes = sorted(str(tuple(p.shape)) for p in strangers)
            raise ConfigError(
                f"the optimizer holds {len(strangers)} parameters that are not clipped, "
                f"of shapes {', '.join(shapes)}"
            )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make the noisy step that the clipped gradients call for, and forget them.

        After `signal_skip_step(True)` only put the physical batch's sum by: the logical step goes on.

        Parameters
        ----------
        closure
            Computes the loss and calls `backward`; called once, first.

        Raises
        ------
        ConfigError
            If no backward pass was clipped since the last step, or its gradients were cleared.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._physical and self._physical.pop(0):
            self._put_by()
            return loss
        if self.clip.gathered.backward_passes <= self._cleared:
            raise ConfigError(
                "step() without a clipped gradient since the last step: call loss.backward() on the module "
                "that is clipped, after zero_grad(); for an empty batch call step_empty()"
            )
        self._put_by()
        self._finish()
        return loss

    def step_empty(self) -> None:
        """Make the step of a batch without samples: noise only, accounted as every other.

        Raises
        ------
        ConfigError
            If there is a clipped gradient, which the step would drop.

        """
        if self.clip.gathered.backward_passes > self._cleared:
            raise ConfigError("step_empty() with clipped gradients: call step()")
        self._finish()

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Tell what the next `step()` not told of yet is: True for a physical batch with more to come."""
        self._physical.append(do_skip)

    def _put_by(self) -> None:
        """Move the gradients to where `zero_grad` does not reach them."""
        for p in self.parameters:
            if p.grad is not None:
                self._sums[p] = self._sums[p] + p.grad if p in self._sums else p.grad
                p.grad = None

    def _finish(self) -> None:
        sigma = self.clip.style.gradient_noise_multiplier(self.noise_multiplier)
        gathered = self.clip.take(self.generator)
        for p in self.parameters:
            p.grad = self._sums.pop(p, None)
        self._cleared = 0
        add_gaussian_noise(self.parameters, sigma, gathered.l2_bound, self.generator)
        for p in self.parameters:
            assert p.grad is not None
            p.grad /= self._divisor
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        for hook in self._hooks:
            hook(self)
        self.original_optimizer.step()
        for p in self.parameters:
            p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients gathered since the last `step()`, a physical batch's included."""
        for p in self.parameters:
            p.grad = None
        # What an earlier physical batch put by stays, and what it gathered with it.
        self._cleared = self.clip.gathered.backward_passes if not self._sums else self._cleared

    def attach_step_hook(self, hook: Callable[[PrivateOptimizer], None]) -> None:
        """Call `hook(self)` in every logical step, after the noise and before the weights move."""
        self._hooks.append(hook)

    @property
    def max_grad_norm(self) -> Any:
        """The clipping norm in force. It can be set between logical steps."""
        return self.clip.style.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: Any) -> None:
        self.clip.set_max_norm(max_grad_norm)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer inside."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of the optimizer inside."""
        return self.original_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the optimizer inside."""
        return self.original_optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, all of them clipped.

        Raises
        ------
        ConfigError
            If one is not clipped.

        """
        parameters = param_group["params"]
        self._check_clipped([parameters] if isinstance(parameters, nn.Parameter) else list(parameters))
        self.original_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, but the noise generator: noise is never drawn twice."""
        return {
            **self.original_optimizer.state_dict(),
            "accountant": self.accountant.state_dict(),
            "clip": self.clip.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, between logical steps.

        Raises
        ------
        ConfigError
            If the state has no accountant: epsilon would start from zero.

        """
        if not state_dict.get("accountant"):
            raise ConfigError("this state has no accountant: the privacy spent so far would be forgotten")
        self.accountant.load_state_dict(state_dict["accountant"])
        self.clip.load_state_dict(state_dict["clip"])
        self.original_optimizer.load_state_dict(
            {name: state_dict[name] for name in ("state", "param_groups")}
        )

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.original_optimizer!r}, noise_multiplier={self.noise_multiplier})"

    def __getstate__(self) -> Any:
        raise ConfigError("a PrivateOptimizer holds a model's hooks: save its state_dict()")
