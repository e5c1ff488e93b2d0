"""Who computes a whole model's per-sample gradients, and whether they are right, in float64."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from psgrad.bench.zoo import build, classification_loss, image_size, outline, still_random_modules, wake
from psgrad.capture.survey import layers_of
from psgrad.per_sample import PerSampleGrads

__all__ = ["CONTENDERS", "Outcome", "compare", "fallbacks"]

RELATIVE, OF_THE_WHOLE = 1e-8, 1e-12
"""Error allowed of a parameter's gradients: of its own norm, and of the whole gradient's (roundoff of what
a later normalisation takes out again)."""


@dataclass(frozen=True)
class Outcome:
    """What became of a model's per-sample gradients.

    Attributes
    ----------
    verdict
        "right": every parameter's equal the one-by-one loop's. "wrong": one's do not, or are missing.
        "raises": there are none.
    error
        The largest relative error of a parameter's gradients, in L2 norm; None if there are none.
    wrong
        How many parameters' are wrong.
    reason
        What was raised, in full; empty otherwise.

    """

    verdict: Literal["right", "wrong", "raises"]
    error: float | None = None
    wrong: int = 0
    reason: str = ""


def compare(name: str, contender: str, samples: int = 2) -> Outcome:
    """Compare one contender's gradients of one of torchvision's models with the loop's.

    Dropout and stochastic depth are in eval mode, all else in training mode.

    Parameters
    ----------
    name
        As torchvision lists it.
    contender
        A name in `CONTENDERS`.
    samples
        N; memory is that of 3 + N copies of the model in float64.

    """
    prepare, compute = CONTENDERS[contender]
    torch.manual_seed(0)
    size = image_size(name)
    try:
        model = still_random_modules(wake(prepare(name))).double()
        images = torch.randn(samples, 3, size, size, dtype=torch.double)
        labels = torch.randint(10, (samples,))
        compute(model, images, labels)
    except Exception as err:  # whatever a contender raises is its outcome
        return Outcome("raises", reason=f"{type(err).__name__}: {err}")
    return _judge(model, images, labels)


def _judge(model: nn.Module, images: Tensor, labels: Tensor) -> Outcome:
    """Compare every parameter's `grad_sample` with an ordinary backward per sample."""
    parameters = list(model.parameters())
    missing = [p for p in parameters if getattr(p, "grad_sample", None) is None]
    if missing:
        return Outcome("wrong", 1.0, len(missing))
    squares, sq_errors = torch.zeros(2, len(parameters), dtype=torch.double)
    for n in range(len(images)):
        loss = classification_loss(model, images[n : n + 1], labels[n : n + 1])
        for i, expected in enumerate(torch.autograd.grad(loss, parameters)):
            squares[i] += expected.square().sum()
            sq_errors[i] += (parameters[i].grad_sample[n] - expected).square().sum()  # type: ignore[attr-defined]  # hung on it
    norms, errors = squares.sqrt(), sq_errors.sqrt()
    wrong = ~(errors <= RELATIVE * norms + OF_THE_WHOLE * norms.norm())  # also what is NaN
    if not wrong.any():
        return Outcome("right", float((errors / (norms + OF_THE_WHOLE * norms.norm())).max()))
    return Outcome("wrong", float((errors / norms)[wrong].max()), int(wrong.sum()))


def _psgrad(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with PerSampleGrads(model):
        classification_loss(model, images, labels).backward()


def _opacus(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    wrapped = GradSampleModule(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # its hooks on the first layer
        classification_loss(wrapped, images, labels).backward()
    wrapped.remove_hooks()


def _fixed(name: str) -> nn.Module:
    """All that Opacus asks for: attention is replaced as well."""
    return ModuleValidator.fix(build(name, replace=False))


def _fixed_without_in_place(name: str) -> nn.Module:
    model = _fixed(name)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]  # a flag
    return model


CONTENDERS: dict[str, tuple[Callable[[str], nn.Module], Callable[[nn.Module, Tensor, Tensor], None]]] = {
    "psgrad": (build, _psgrad),
    "Opacus": (_fixed, _opacus),
    "Opacus, no in-place flags": (_fixed_without_in_place, _opacus),
}
"""How the model is prepared, and what leaves `p.grad_sample` on every parameter."""


def fallbacks(name: str) -> dict[str, int]:
    """Types of the modules of a model that psgrad runs under `torch.func`, and how many: a batch is run."""
    if all(layer.rule for layer in layers_of(outline(name))):
        return {}
    model, size = build(name), image_size(name)
    with PerSampleGrads(model) as handle:
        model(torch.rand(2, 3, size, size))
        return dict(Counter(type(model.get_submodule(path)).__name__ for path in handle.regions))
