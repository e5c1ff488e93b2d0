"""`PrivateOptimizer`: clipped sums in, noise, a constant divisor, one accounted step out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus.accountants.accountant import IAccountant
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from psgrad.clipping import ClipPerSample
from psgrad.dp.accounting import load_spent
from psgrad.dp.arguments import refuse_closures, refuse_half_precision
from psgrad.dp.batches import SampledBatches
from psgrad.dp.noise import add_gaussian_noise, noise_generator
from psgrad.dp.optimizer_names import INSTEAD
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
    the accountant before the weights move. No step moves a parameter whose gradient was not clipped. A step
    without a backward pass since the last raises (for an empty batch there is `step_empty()`, though a
    backward pass over no rows does as well), and so does `step()` of the optimizer inside.

    Raises
    ------
    ConfigError
        If the clip handle does not sum, a number is out of range, the optimizer holds other parameters
        than those that are clipped, or its step calls for a closure (LBFGS).

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
        if not 0 <= noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier must be finite and 0 or more, got {noise_multiplier}")
        # Not torch's own __init__: groups, state and hooks are the inner optimizer's.
        optimizer = getattr(optimizer, "original_optimizer", optimizer)  # a private one, given once more
        self.original_optimizer = optimizer
        self.clip = clip
        self.parameters: list[nn.Parameter] = list(clip.trainable.values())
        refuse_closures(optimizer)
        refuse_half_precision(clip.trainable)
        self._check_clipped()
        for p in self.parameters:
            p.grad = None  # what was not clipped; nor may it be mistaken for what will be
        clip.forget()
        self.noise_multiplier = noise_multiplier
        self._expected_batch_size = expected_batch_size
        self._divisor = expected_batch_size if divisor is None else divisor
        self._accountant = accountant
        self.sample_rate = sample_rate
        self.generator = generator or noise_generator(self.parameters[0].device)
        self._physical: list[bool] = []
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._seen = 0  # backward passes of this logical step that a step() has put by
        self._before_batch: int | None = None  # those waiting for a step when a batch was drawn
        self.batches = SampledBatches()
        """What the loader of this optimizer's batches tells."""
        self._hooks: list[Callable[[PrivateOptimizer], None]] = []
        self._in_step = False
        optimizer.register_step_pre_hook(self._refuse_bare_step)

    def _refuse_bare_step(self, *_: Any) -> None:
        if not (self._in_step or self.clip.removed):
            raise ConfigError(
                "step() of the optimizer inside of the private one: its gradients have no noise, and nothing "
                "accounts for it. Call step() of the private one, which make_private returned"
            )

    def _check_clipped(self) -> None:
        clipped = set(self.parameters)
        held = (p for group in self.param_groups for p in group["params"])
        strangers = [p for p in held if p.requires_grad and p not in clipped]
        if strangers:
            shapes = sorted(str(tuple(p.shape)) for p in strangers)
            raise ConfigError(
                f"the optimizer holds {len(strangers)} parameters that are not clipped, "
                f"of shapes {', '.join(shapes)}"
            )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # one form for torch's two
        """Make the noisy step that the clipped gradients call for, and forget them.

        After `signal_skip_step(True)` only put the physical batch's sum by: the logical step goes on.

        Parameters
        ----------
        closure
            Computes the loss and calls `backward`; called once, first.

        Raises
        ------
        ConfigError
            If no backward pass was clipped since the last call, or its gradients were cleared; if they are
            of two batches of a `PoissonLoader`, or of one that had its step; if the optimizer holds a
            trainable parameter that is not clipped; under `torch.amp.GradScaler`.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_passes()
        self._put_by()
        if self._physical and self._physical.pop(0):
            return loss
        self._finish()
        return loss

    def _check_passes(self) -> None:
        if getattr(self, "found_inf", None) is not None:
            raise ConfigError(
                "GradScaler scales the loss before gradients are clipped, and the clipped sum afterwards: "
                "use bfloat16 autocast, which needs no scaler"
            )
        if self.clip.removed:
            raise ConfigError(
                "step() after the clip handle was removed: gradients are not clipped any more. Use "
                "optimizer.original_optimizer, or attach a new handle"
            )
        passes = self.clip.gathered.backward_passes
        if passes <= self._seen:
            raise ConfigError(
                "step() without a clipped gradient since the last step: call loss.backward() on the module "
                "that is clipped, after zero_grad(); for an empty batch call step_empty()"
            )
        if self._before_batch is not None and passes > self._before_batch:
            raise ConfigError(
                "a step with the gradients of two batches of the loader: a sample may be in both, and change "
                "the sum by twice its bound. Call step() after every batch; what is too large at once goes "
                "through backward in parts, or through BatchMemoryManager"
            )
        gathered = self.clip.gathered.samples // self.clip.gradients_per_sample
        self.batches.check(gathered, stacklevel=4)
        self._seen = passes

    def step_empty(self) -> None:
        """Make the step of a batch without samples: noise only, accounted as every other.

        Raises
        ------
        ConfigError
            If there is a clipped gradient, which the step would drop.

        """
        if self.clip.gathered.backward_passes > self._seen:
            raise ConfigError("step_empty() with clipped gradients: call step()")
        self._finish()

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Tell what the next `step()` not told of yet is: True for a physical batch with more to come."""
        self._physical.append(do_skip)

    def batch_sampled(self, samples: int) -> None:
        """Tell that a loader has sampled a logical batch, perhaps ahead of the one that it yields next.

        `step()` refuses to be called more often than that, and warns of more samples than there are.
        """
        self.batches.sampled(samples)

    def batch_drawn(self) -> None:
        """Tell that a loader yields the next logical batch: `step()` refuses gradients from two."""
        if self.clip.gathered.backward_passes:
            self._before_batch = self.clip.gathered.backward_passes

    def pass_begins(self) -> None:
        """Tell that a loader starts a pass: what an interrupted logical step left behind is forgotten."""
        self.batches.pass_begins()
        self._start_anew()

    def _start_anew(self) -> None:
        self._physical.clear()
        self._sums.clear()
        self.zero_grad()

    def _put_by(self) -> None:
        """Move the gradients to where `zero_grad` does not reach them."""
        for p in self.parameters:
            if p.grad is not None:
                self._sums[p] = self._sums[p] + p.grad if p in self._sums else p.grad
                p.grad = None

    def _finish(self) -> None:
        self._check_clipped()  # one may have been thawed since, or been given to the optimizer inside
        sigma = self.clip.style.gradient_noise_multiplier(self.noise_multiplier)
        gathered = self.clip.take(self.generator)
        for p in self.parameters:
            p.grad = self._sums.pop(p, None)
        self._seen, self._before_batch = 0, None
        self.batches.step_made()
        add_gaussian_noise(self.parameters, sigma, gathered.l2_bound, self.generator)
        for p in self.parameters:
            assert p.grad is not None
            p.grad /= self._divisor
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        for hook in self._hooks:
            hook(self)
        self._in_step = True
        try:
            self.original_optimizer.step()
        finally:
            self._in_step = False
        for p in self.parameters:
            p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients gathered since the last `step()`, a physical batch's included."""
        for p in self.parameters:
            p.grad = None
        if self._sums:  # what an earlier physical batch put by stays, and what it gathered with it
            self._seen = self.clip.gathered.backward_passes
        else:
            self.clip.forget()
            self._seen, self._before_batch = 0, None

    def attach_step_hook(self, hook: Callable[[PrivateOptimizer], None]) -> None:
        """Call `hook(self)` in every logical step, after the noise and before the weights move."""
        self._hooks.append(hook)

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Call `hook` before the step of the optimizer inside, with it, the noise in `.grad`."""
        return self.original_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Call `hook` after the step of the optimizer inside, with it."""
        return self.original_optimizer.register_step_post_hook(hook)

    _step_supports_amp_scaling = True  # makes GradScaler show itself, in `found_inf`

    @property
    def accountant(self) -> IAccountant:
        """Who is told of every step: the same from the first to the last."""
        return self._accountant

    @property
    def params(self) -> list[nn.Parameter]:
        """Those that are clipped, which Opacus calls so."""
        return self.parameters

    @property
    def loss_reduction(self) -> str:
        """Of the loss over its batch, "mean" or "sum"."""
        return self.clip.loss_reduction

    def __getattr__(self, name: str) -> Any:
        instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    @property
    def accumulated_iterations(self) -> int:
        """1: a logical step is one batch of the sampler, in as many physical batches as may be."""
        return 1

    @property
    def max_grad_norm(self) -> Any:
        """The clipping norm in force. It can be set between logical steps."""
        return self.clip.style.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: Any) -> None:
        self.clip.set_max_norm(max_grad_norm)

    @property
    def expected_batch_size(self) -> float:
        """The sample rate times the number of samples. Fixed, as is what the noisy sum is divided by."""
        return self._expected_batch_size

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer inside."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """That of the optimizer inside."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute there
        """Those of the optimizer inside."""
        return self.original_optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, all of them clipped.

        Raises
        ------
        ConfigError
            If one is not clipped.

        """
        self.original_optimizer.add_param_group(param_group)
        try:
            self._check_clipped()
        except ConfigError:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, but the noise generator: noise is never drawn twice."""
        return {
            **self.original_optimizer.state_dict(),
            "accountant": self.accountant.state_dict(),
            "clip": self.clip.state_dict(),
            "noise_multiplier": self.noise_multiplier,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, between logical steps; a step half gathered is forgotten.

        So does the noise multiplier, which a scheduler may have moved. What the accountant has recorded
        since the state was taken stays recorded: it is spent, also if its weights are dropped.

        Noise is drawn from a new, unseeded generator from now on: the one given, if its seed is the
        interrupted run's, would draw that run's noise once more, and two results with the same noise
        differ by what it should hide.

        Raises
        ------
        ConfigError
            If the state has no accountant: epsilon would start from zero.

        """
        if not state_dict.get("accountant"):
            raise ConfigError("this state has no accountant: the privacy spent so far would be forgotten")
        self.generator = noise_generator(self.generator.device)
        self._start_anew()
        load_spent(self.accountant, state_dict["accountant"])
        self.clip.load_state_dict(state_dict["clip"])
        self.noise_multiplier = state_dict.get("noise_multiplier", self.noise_multiplier)
        self.original_optimizer.load_state_dict(
            {name: state_dict[name] for name in ("state", "param_groups")}
        )

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.original_optimizer!r}, noise_multiplier={self.noise_multiplier})"

    def __getstate__(self) -> Any:
        raise ConfigError("a PrivateOptimizer holds a model's hooks: save its state_dict()")
