"""`clip_per_sample`: after an ordinary `backward`, `p.grad` holds the sum of clipped gradients.

A norm over several layers is known only when backward has reached them all; `psgrad.held` holds the layers
in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture import Attached, attach, attach_repeatable
from psgrad.capture.contribution import Contribution
from psgrad.clipping.adaptive import AdaptiveQuantile
from psgrad.clipping.result import ClipResult, Gathered
from psgrad.clipping.styles import ClippingStyle, Group, l2_bound
from psgrad.clipping.table import as_style
from psgrad.conv.budget import check_budget
from psgrad.errors import ConfigError
from psgrad.held import Held, total_norms
from psgrad.loss import LossCheck, LossReduction, checked_reduction
from psgrad.within_budget import WithinBudget

__all__ = ["ClipPerSample", "clip_per_sample"]


class ClipPerSample:
    """The handle that `clip_per_sample` returns.

    `.result` is of the last backward pass; `.take()` ends a logical step of one or more of them.
    """

    def __init__(
        self,
        module: nn.Module,
        style: ClippingStyle,
        loss_reduction: LossReduction,
        rows_per_sample: int,
        *,
        into_sum: bool = False,
        memory_budget: int | None = None,
    ) -> None:
        self.loss_reduction = checked_reduction(loss_reduction)
        self.into_sum = into_sum or loss_reduction == "sum"
        """Whether the clipped sum lands in `.grad`, also where the loss is a mean."""
        self.removed = False
        """Whether gradients are not clipped any more."""
        self._on_removal: list[Callable[[], None]] = []
        self._result: ClipResult | None = None
        check = LossCheck(self.loss_reduction, samples_must_not_mix=True)
        self._capture: Attached
        self._held: Held | WithinBudget
        if memory_budget is None:
            self._capture = attach(module, self, rows_per_sample, check)
            self._held = Held()
        else:
            check_budget(memory_budget)
            self._capture = repeatable = attach_repeatable(module, self, rows_per_sample, check)
            self._held = WithinBudget(memory_budget, repeatable)
        try:
            self._use(style)
        except ConfigError:
            self.remove()
            raise

    def _use(self, style: ClippingStyle) -> None:
        if self._capture.gradients_per_sample > 1 and isinstance(style, AdaptiveQuantile):
            raise ConfigError(
                "style 'adaptive' follows a quantile of one model's norms, and this is an ensemble of "
                f"{self._capture.gradients_per_sample}: use 'flat', 'per_layer' or 'automatic'"
            )
        trainable = self.trainable
        self._groups: tuple[Group, ...] = style.groups(list(trainable))
        self._members = {group.path: [trainable[name] for name in group.names] for group in self._groups}
        self.style = style
        self._gathered = Gathered.nothing(self.l2_bound)
        self._unclipped = torch.tensor(0.0, device="cpu")

    @property
    def l2_bound(self) -> float:
        """The most that one sample can change the clipped sum of the present logical step by, in L2 norm.

        Of an ensemble: the sums of all K members together, in each of which it may be once; so sqrt(K) C.
        """
        return l2_bound(self._groups) * math.sqrt(self._capture.gradients_per_sample)

    @property
    def result(self) -> ClipResult:
        """Norms and factors of the last backward pass.

        Raises
        ------
        ConfigError
            If there was none.

        """
        if self._result is None:
            raise ConfigError("no backward pass has been clipped yet")
        return self._result

    @property
    def regions(self) -> dict[str, str]:
        """By path, the modules that run one sample at a time, under `torch.vmap`, which costs time, and why.

        They use parameters of their own in a way that is not known to keep samples apart. The first batch
        tells; before, these are all that might. Of an ensemble none: its `plan` says what runs how.
        """
        return self._capture.regions

    @property
    def gathered(self) -> Gathered:
        """What the backward passes since the last `take()` have put into `.grad`."""
        return self._gathered

    def take(self, generator: torch.Generator | None = None) -> Gathered:
        """End the logical step: return what was gathered, and start the next.

        Call it once per step of the optimizer, whether there was a backward pass or not; an adaptive style
        moves its bound here, after the step that used it.

        Parameters
        ----------
        generator
            For the noise of an adaptive style's count, on the CPU or the model's device.

        Returns
        -------
        Gathered
            With the bound that the gathered sum has. Zero backward passes: `.grad` holds nothing bounded.

        Raises
        ------
        ConfigError
            If the style needs noise and there is no generator; nothing is taken then.

        """
        following = self.style.after_step(self._unclipped, generator)
        gathered = self._gathered
        self._use(following)
        return gathered

    def forget(self) -> None:
        """Start the logical step anew, for gradients that are thrown away: no count keeps their samples."""
        self._use(self.style)

    once = True
    """See `psgrad.capture.Consumer`."""

    def add(self, contribution: Contribution) -> None:
        """Take one layer's contribution; part of `backward`."""
        self._held.add(contribution)

    def finish(self, samples: int) -> None:
        """Clip and publish; part of `backward`."""
        sq_norms = self._held.sq_norms(self._members)
        # The norm of the sample's own gradient: under "mean", backward saw 1/N of it.
        scale = samples if self.loss_reduction == "mean" else 1
        norms = total_norms(sq_norms.values()) * scale
        group_norms = {path: total_norms([sq_norm]) * scale for path, sq_norm in sq_norms.items()}
        group_factors = self._factors(group_norms, norms.isfinite())
        # One tensor for all parameters of a group: their weighted sums are computed together.
        undone = scale if self.into_sum else 1
        weights = {path: factors * undone for path, factors in group_factors.items()}
        self._held.release({p: weight for path, weight in weights.items() for p in self._members[path]})
        factors = torch.stack(list(group_factors.values())).amin(0) if group_factors else norms
        self._result = ClipResult(
            norms, factors, self.l2_bound, group_norms, group_factors, self._held.passes
        )
        self._count(self._result)

    def _factors(self, norms: dict[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
        """Return the factors by group; a sample that is not finite has 0 in all."""
        found: dict[str, Tensor] = {}
        for group in self._groups:
            if group.path in norms:
                factors = self.style.factors(norms[group.path], group.max_norm)
                found[group.path] = torch.where(finite, factors, torch.zeros_like(factors))
        return found

    def _count(self, result: ClipResult) -> None:
        norms, so_far = result.norms, self._gathered
        within = result.factors.ge(1) & norms.isfinite()
        self._unclipped = self._unclipped.to(norms.device) + (within.double() - 0.5).sum()
        self._gathered = replace(
            so_far,
            backward_passes=so_far.backward_passes + 1,
            samples=so_far.samples + norms.numel(),
            non_finite=so_far.non_finite.to(norms.device) + result.non_finite.sum(),
        )

    def abandon(self) -> None:
        """Drop what an unfinished backward pass left."""
        self._held.clear()

    @property
    def gradients_per_sample(self) -> int:
        """1, or of an ensemble K, in each of which a sample has a gradient."""
        return self._capture.gradients_per_sample

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that are clipped, by path."""
        return self._capture.trainable

    def set_max_norm(self, max_norm: float | Mapping[str, float]) -> None:
        """Clip by another bound from the next backward pass on.

        Raises
        ------
        ConfigError
            In the middle of a logical step, whose sum would have two bounds, or for a bound out of range.

        """
        if self._gathered.backward_passes:
            raise ConfigError(
                "max_norm changes between logical steps: a backward pass has been clipped already"
            )
        self._use(replace(self.style, max_norm=max_norm))  # type: ignore[type-var]  # a dataclass

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, between logical steps: the bound in force."""
        return {"max_norm": self.style.max_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the bound that `state_dict` told; a step half gathered is forgotten.

        Raises
        ------
        ConfigError
            If the state holds no bound, or one that the style does not take.

        """
        if "max_norm" not in state:
            raise ConfigError("this state has no max_norm: the bound in force would be forgotten")
        self._use(replace(self.style, max_norm=state["max_norm"]))  # type: ignore[type-var]  # a dataclass

    def on_removal(self, call: Callable[[], None]) -> None:
        """Call `call` when the handle is removed, for those who have left something on the module as well."""
        self._on_removal.append(call)

    def remove(self) -> None:
        """Detach from the module. Twice is as good as once."""
        self.removed = True
        self._capture.remove()
        while self._on_removal:
            self._on_removal.pop()()

    def __enter__(self) -> ClipPerSample:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def clip_per_sample(
    module: nn.Module,
    max_norm: float | Mapping[str, float] | ClippingStyle,
    loss_reduction: LossReduction = "mean",
    *,
    style: str | None = None,
    rows_per_sample: int = 1,
    memory_budget: int | None = None,
) -> ClipPerSample:
    """Clip every sample's gradient during `backward`, for any training loop.

    Parameters
    ----------
    module
        The model, or a `psgrad.ensemble.Ensemble`, of which every member is clipped as if it were alone.
    max_norm
        C > 0, the largest L2 norm that a sample's gradient over all trainable parameters keeps; a longer
        one is scaled down to it. With inf, `p.grad` is the ordinary gradient. By path of modules for the
        style "per_layer". Or a style with its settings: `Automatic(1.0, gamma=0.1)`.
    loss_reduction
        How the loss combines the batch, "mean" or "sum". Norms are always
        those of a sample's own loss.
    style
        A name in `psgrad.clipping.STYLES`: "flat" (the default), "per_layer", "automatic", "adaptive".
        For norms without clipping there is `GradNorms`.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample.
    memory_budget
        Bytes, or None for no limit: see below.

    Returns
    -------
    ClipPerSample
        A handle and context manager: `.result`, `.l2_bound`, `.take()`, `.remove()`.

    Guarantees
    ----------
    When `backward` returns, `p.grad` of every trainable parameter has grown by the clipped sum under
    "sum", by the clipped sum over N under "mean". One sample, added or removed, changes the clipped sum by
    at most `.l2_bound`, also when several backward passes add up to it, if it is in one of them only. Through
    one forward pass backward goes once; who runs a sample forward twice is not seen here. The bound is of the
    sum before it is rounded to the parameter's dtype: in bfloat16, one sample beside 1024 alike may change
    it by 2.5 times as much. Keep parameters in float32 where the bound is to hold. A sample whose
    gradient is not finite contributes nothing and is reported in `.result.non_finite`. A parameter that is
    used several times is clipped by the norm of the sum of its uses.

    Of an ensemble all this holds for every member: `p.grad[k]` is what the member alone would have, norms and
    factors are `[K, N]`, and `.l2_bound` is of all members together.

    Memory
    ------
    Between a layer's backward and the end of `backward`, clipping holds the layer's input and output gradient
    or its per-sample gradients, whichever is faster. `memory_budget` limits these bytes, all layers together.
    Where they are too few, nothing is held: backward runs through the module twice, first for the norms, then
    for the clipped sum (`.result.passes`), which takes the time of another backward pass without weight
    gradients. Peak memory is then that of what forward saves for backward, which stays until the norms are
    known, of the parameters' gradients, of the budget, and of the gradients and temporaries of one layer. A
    budget that everything fits in takes more memory than None, which lets go of saved tensors on the way.

    With a budget, the module's graph is apart from that of the loss:

    - Only what the module returns may reach the loss, and one backward pass goes through it, also with
      `retain_graph=True`: else `CaptureError`.
    - Backward hooks inside of the module see every pass, all with the same random numbers. One that keeps
      count, and changes gradients by it, changes them between norm and sum: the bound does not hold then.
    - Submodules that `torch.compile` compiled need `torch._functorch.config.donated_buffer = False`, as torch
      says.
    - Parameters that are used several times are held, as the norm is that of the sum of the uses; if these
      alone exceed the budget, `backward` raises `ConfigError`, and so it does where a submodule that was
      called by itself would have to run twice.

    Raises
    ------
    ConfigError
        If the style, max_norm, loss_reduction or memory_budget is unknown or out of range, or an ensemble is
        given a memory_budget. In `backward`, where the loss's graph shows that it is not what was said, or is
        a mean over what depends on the whole batch: class weights, ignored targets (`psgrad.loss`; of an
        ensemble, `Ensemble.loss` raises), and on the first batch where the loss mixes samples.
    RefusedModelError
        If the model mixes samples, has nothing to train, or has a layer without per-sample gradients.

    """
    return ClipPerSample(
        module, as_style(max_norm, style), loss_reduction, rows_per_sample, memory_budget=memory_budget
    )
