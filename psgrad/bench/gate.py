"""No timing without a green check: each contender against a float64 loop on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from psgrad.bench.cases import ConvCase
from psgrad.bench.peers import Contender
from psgrad.conv.strategies import Verb

__all__ = ["Verdict", "check", "reference"]

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest error of a sample's gradient, relative to its norm, that is taken for rounding."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes
    ----------
    error
        Largest over the samples of |difference| / |reference|; NaN if there was nothing to compare.
    reason
        Why the contender gets no number, or None if it is right.

    """

    error: float
    reason: str | None


def reference(case: ConvCase, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Yield each sample's weight gradient `[*weight_shape]`: float64, on the CPU, by autograd."""
    x, grad = x.detach().cpu().double().contiguous(), grad.detach().cpu().double().contiguous()
    weight = torch.zeros(case.weight_shape, dtype=torch.float64, requires_grad=True)
    for row, row_grad in zip(x.split(1), grad.split(1), strict=True):
        with torch.enable_grad():
            out = CONVOLUTIONS[case.rank](
                row, weight, None, case.stride, case.padding, case.dilation, case.groups
            )
            yield torch.autograd.grad(out, weight, row_grad)[0]


def check(contender: Contender, case: ConvCase, x: Tensor, grad: Tensor, verb: Verb = "grads") -> Verdict:
    """Run a contender once and judge its result; an error that it raises is a reason too.

    `verb` says what it must return: gradients `[N, *weight_shape]` or squared norms `[N]`.
    """
    try:
        result = contender(x, grad)
    except Exception as err:  # whatever a peer raises keeps it out of the table, not the others
        return Verdict(float("nan"), f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}")
    expected_shape = (x.shape[0], *(case.weight_shape if verb == "grads" else ()))
    if tuple(result.shape) != expected_shape:
        return Verdict(float("nan"), f"shape {tuple(result.shape)} instead of {expected_shape}")
    worst = 0.0
    for actual, expected in zip(result.cpu(), reference(case, x, grad), strict=True):
        if verb == "sq_norms":
            expected = expected.square().sum()
        difference = (actual.double() - expected).norm()
        error = float(difference / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
        if not error < float("inf"):
            return Verdict(error, "not finite")
        worst = max(worst, error)
    if worst > TOLERANCES[x.dtype]:
        return Verdict(worst, f"wrong by {worst:.1%}" if worst > 1e-3 else f"wrong by {worst:.1e}")
    return Verdict(worst, None)
