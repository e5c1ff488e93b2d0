"""No timing without a green check: each contender against a float64 loop on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psgrad.bench.cases import ConvCase
from psgrad.bench.memory import peak_bytes
from psgrad.bench.peers import BenchVerb, Contender, factors

__all__ = ["Expected", "Verdict", "check", "judge", "raised", "reference"]

CONVOLUTIONS: dict[tuple[int, bool], Any] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}

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
    peak_bytes
        Memory that the call added at its highest point, the result included; None where not known.

    """

    error: float
    reason: str | None
    peak_bytes: int | None = None


def raised(error: Exception) -> Verdict:
    """Return the verdict on a contender that raises: the type and the first line of the error."""
    first = (str(error).strip().splitlines() or [""])[0]
    return Verdict(float("nan"), f"{type(error).__name__}: {first}")


class Expected:
    """The reference results of a case, computed once for all verbs and contenders.

    Attributes
    ----------
    verbs
        Expected results by verb: gradients `[N, *weight_shape]` in float32 (float64 for float64
        operands), whose rounding is far under every tolerance; norms and sum in float64.

    """

    def __init__(self, case: ConvCase, x: Tensor, grad: Tensor) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        grads = torch.empty(x.shape[0], *case.weight_shape, dtype=dtype)
        norms = torch.empty(x.shape[0], dtype=torch.float64)
        total = torch.zeros(case.weight_shape, dtype=torch.float64)
        weights = factors(x).cpu().to(x.dtype).double()
        for n, row in enumerate(reference(case, x, grad)):
            grads[n] = row
            norms[n] = row.square().sum()
            total += weights[n] * row
        self.verbs: dict[BenchVerb, Tensor] = {"grads": grads, "sq_norms": norms, "weighted_sum": total}


def reference(case: ConvCase, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Yield each sample's weight gradient `[*weight_shape]`: float64, on the CPU, by autograd."""
    x, grad = x.detach().cpu().double().contiguous(), grad.detach().cpu().double().contiguous()
    weight = torch.zeros(case.weight_shape, dtype=torch.float64, requires_grad=True)
    convolve = CONVOLUTIONS[case.rank, case.transposed]
    options = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    for row, row_grad in zip(x.split(1), grad.split(1), strict=True):
        with torch.enable_grad():
            out = convolve(row, weight, None, groups=case.groups, **options)
            yield torch.autograd.grad(out, weight, row_grad)[0]


def check(
    contender: Contender, case: ConvCase, x: Tensor, grad: Tensor, verb: BenchVerb = "grads"
) -> Verdict:
    """Run a contender once and judge its result; an error that it raises is a reason too.

    `verb` says what it must return: gradients `[N, *weight_shape]`, squared norms `[N]`, or the sum
    weighted by `factors`.
    """
    return judge(contender, x, grad, Expected(case, x, grad).verbs[verb], verb)


def judge(
    contender: Contender,
    x: Tensor,
    grad: Tensor,
    expected: Tensor,
    verb: BenchVerb,
    tolerance: float | None = None,
) -> Verdict:
    """See `check`, with the expected result at hand; peak memory is seen on the way."""
    result, peak = None, None
    try:
        result, peak = peak_bytes(lambda: contender(x, grad), x.device)
    except Exception as err:  # whatever a peer raises keeps it out of the table, not the others
        return raised(err)
    if result.shape != expected.shape:
        return Verdict(float("nan"), f"shape {tuple(result.shape)} instead of {tuple(expected.shape)}")
    if verb == "weighted_sum":
        result, expected = result[None], expected[None]
    worst = 0.0
    for actual, right in zip(result, expected, strict=True):
        difference = (actual.cpu().to(right.dtype) - right).norm()
        error = float(difference / right.norm().clamp_min(torch.finfo(right.dtype).tiny))
        if not error < float("inf"):
            return Verdict(error, "not finite", peak)
        worst = max(worst, error)
    if worst > (TOLERANCES[x.dtype] if tolerance is None else tolerance):
        return Verdict(worst, f"wrong by {worst:.1%}" if worst > 1e-3 else f"wrong by {worst:.1e}", peak)
    return Verdict(worst, None, peak)
