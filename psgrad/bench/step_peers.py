"""Who trains: every way of getting the mean of clipped gradients into `p.grad`, and the step without."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import prepare_module
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from psgrad import GradNorms, clip_per_sample
from psgrad.bench.step_models import without_in_place
from psgrad.errors import RefusedModelError
from psgrad.interop import opacus

__all__ = ["STEPPERS", "NonPrivate", "Stepper", "StepperMaker", "written_bytes"]

LEARNING_RATE = 1e-3


class Stepper(ABC):
    """One way of training: `gradient` then `update`, again and again, on a model of its own.

    Attributes
    ----------
    model
        With the parameters that are trained, in the order of the model it was made from.
    clips
        Whether `p.grad` is the mean of clipped gradients; if not it is the ordinary one.
    holds_gradients
        Whether all per-sample gradients of the model are in memory at once, which a limit then counts.

    """

    clips = True
    holds_gradients = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: Any = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    @abstractmethod
    def gradient(self, x: Tensor, y: Tensor) -> None:
        """Forward and backward: leave the gradient of the mean loss in `p.grad`."""

    def norms(self) -> Tensor | None:
        """Per-sample gradient norms `[N]` of the last `gradient`, of those that only look."""
        return None

    def update(self) -> None:
        """Step, and let go of every gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, x: Tensor, y: Tensor) -> None:
        """Do what is timed."""
        self.gradient(x, y)
        self.update()


StepperMaker = Callable[[nn.Module, float, int], Stepper]
"""From a model, which stays as it is, C and N; what it does here is not timed."""


class NonPrivate(Stepper):
    """The floor: an ordinary training step."""

    clips = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(copy.deepcopy(model))

    def gradient(self, x: Tensor, y: Tensor) -> None:
        """See `Stepper.gradient`."""
        F.cross_entropy(self.model(x), y).backward()


class PsgradClip(NonPrivate):
    """`psgrad.clip_per_sample` on the model as it is."""

    clips = True

    def __init__(
        self, model: nn.Module, max_norm: float, batch_size: int, *, memory_budget: int | None = None
    ) -> None:
        super().__init__(model)
        self.handle = clip_per_sample(self.model, max_norm, memory_budget=memory_budget)


class PsgradNorms(NonPrivate):
    """`psgrad.GradNorms` on the model as it is."""

    def __init__(self, model: nn.Module, max_norm: float, batch_size: int) -> None:
        super().__init__(model)
        self.handle = GradNorms(self.model)

    def norms(self) -> Tensor:
        """See `Stepper.norms`."""
        return self.handle.norms


class OpacusMode(Stepper):
    """Opacus's wrapper and optimizer without noise, in one of its modes, by itself or with psgrad."""

    holds_gradients = True

    def __init__(
        self, mode: str, with_psgrad: bool, model: nn.Module, max_norm: float, batch_size: int
    ) -> None:
        super().__init__(without_in_place(model))
        self.ghost = mode == "ghost"
        self.inside: Callable[[], AbstractContextManager[None]] = (
            partial(opacus.use, opacus.EVERY_LAYER) if with_psgrad else nullcontext
        )
        with self.inside():
            self.engine = prepare_module(
                self.model, grad_sample_mode=mode, **({"max_grad_norm": max_norm} if self.ghost else {})
            )
        kind = DPOptimizerFastGradientClipping if self.ghost else DPOptimizer
        self.optimizer = kind(
            self.optimizer, noise_multiplier=0.0, max_grad_norm=max_norm, expected_batch_size=batch_size
        )
        criterion = nn.CrossEntropyLoss()
        self.criterion = (
            DPLossFastGradientClipping(self.engine, self.optimizer, criterion) if self.ghost else criterion
        )

    def gradient(self, x: Tensor, y: Tensor) -> None:
        """See `Stepper.gradient`; the clipping is the first half of the optimizer's step."""
        with self.inside():
            self.criterion(self.engine(x), y).backward()
        self.optimizer.pre_step()

    def update(self) -> None:
        """See `Stepper.update`; the other half."""
        self.optimizer.original_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class OpacusGhost(OpacusMode):
    """The mode that writes no gradients."""

    holds_gradients = False

    def __init__(self, with_psgrad: bool, model: nn.Module, max_norm: float, batch_size: int) -> None:
        super().__init__("ghost", with_psgrad, model, max_norm, batch_size)


class Written(Stepper):
    """A way of getting every per-sample gradient written out; clipping is three lines of everyone's."""

    holds_gradients = True

    def __init__(self, model: nn.Module, max_norm: float, batch_size: int) -> None:
        super().__init__(without_in_place(model))
        self.max_norm = max_norm

    @abstractmethod
    def per_sample(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Gradient `[N, *p.shape]` of each sample's own loss, for each parameter."""

    def gradient(self, x: Tensor, y: Tensor) -> None:
        """See `Stepper.gradient`."""
        grads = self.per_sample(x, y)
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
        factors = (self.max_norm / norms).clamp(max=1) / len(x)
        for p, grad in zip(self.model.parameters(), grads, strict=True):
            p.grad = torch.tensordot(factors, grad, 1)


class TorchFunc(Written):
    """`vmap(grad(..))` as PyTorch ships it."""

    def __init__(self, model: nn.Module, max_norm: float, batch_size: int) -> None:
        super().__init__(model, max_norm, batch_size)

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.model, params, (x[None],)), y[None])

        self.grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def per_sample(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """See `Written.per_sample`."""
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        return list(self.grads(params, x, y).values())


class BackPack(Written):
    """BackPACK's `BatchGrad`."""

    def __init__(self, model: nn.Module, max_norm: float, batch_size: int) -> None:
        from backpack import backpack, extend  # of the bench extra
        from backpack.extensions import BatchGrad

        super().__init__(model, max_norm, batch_size)
        self.model = extend(self.model)
        self.criterion = extend(nn.CrossEntropyLoss())
        self.inside = lambda: backpack(BatchGrad())

    def per_sample(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """See `Written.per_sample`; BackPACK leaves the 1/N of the mean loss in.

        Raises
        ------
        RefusedModelError
            If a layer is unknown to BackPACK, which passes over it in silence.

        """
        with self.inside():
            self.criterion(self.model(x), y).backward()
        grads = []
        for name, p in self.model.named_parameters():
            grad = getattr(p, "grad_batch", None)
            if grad is None:
                raise RefusedModelError(f"BatchGrad leaves out {name!r}")
            grads.append(grad * len(x))
        return grads

    def update(self) -> None:
        """See `Stepper.update`."""
        super().update()
        for p in self.model.parameters():
            del p.grad_batch  # type: ignore[attr-defined]  # BackPACK's result


STEPPERS: dict[str, StepperMaker] = {
    "psgrad clip": PsgradClip,
    "psgrad clip, two passes": partial(PsgradClip, memory_budget=1),
    "psgrad norms": PsgradNorms,
    "opacus hooks + psgrad": partial(OpacusMode, "hooks", True),
    "opacus ghost + psgrad": partial(OpacusGhost, True),
    "opacus hooks": partial(OpacusMode, "hooks", False),
    "opacus ghost": partial(OpacusGhost, False),
    "opacus functorch": partial(OpacusMode, "functorch", False),
    "opacus ew": partial(OpacusMode, "ew", False),
    "torch.func": TorchFunc,
    "backpack": BackPack,
}
"""Contenders by name, in the order of the tables. All clip but "psgrad norms", which only looks. A new one is
a `Stepper`, or a `Written` if it has per-sample gradients to show, and a line here."""


def written_bytes(make: StepperMaker, model: nn.Module, batch_size: int) -> int:
    """Bytes of the per-sample gradients that a contender holds at once; 0 if it never holds all."""
    kind = make.func if isinstance(make, partial) else make
    if not getattr(kind, "holds_gradients", False):
        return 0
    return batch_size * sum(p.numel() * p.element_size() for p in model.parameters())
