"""The live part of a kernel: offsets that meet padding alone have no gradient, and no cost.

On small inputs such offsets exist: of a 3x3 kernel with padding 1 on a 1x1 input only the centre
ever meets an element. The verbs crop the kernel to what is alive, and put the zeros back around
the result where that costs less than it saves; the norms need no zeros at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from psgrad.conv.geometry import ConvGeometry, meets_padding_alone
from psgrad.conv.problem import WeightGradProblem

__all__ = ["LiveKernel", "live_for", "live_kernel", "worth_cropping"]

FLOPS_PER_BYTE = 12
"""Of a matrix product, in the time in which memory moves a byte."""


@dataclass(frozen=True)
class LiveKernel:
    """How to crop a problem to the offsets that meet an element of x.

    Attributes
    ----------
    problem
        Of the cropped kernel; it has the output size of the whole one.
    ends
        What x is padded by (cut by, where negative), in the order of `torch.nn.functional.pad`.
    dead
        The zeros around the cropped result, in the same order.

    """

    problem: WeightGradProblem
    ends: tuple[int, ...]
    dead: tuple[int, ...]

    def crop(self, x: Tensor) -> Tensor:
        """Return x as the cropped problem wants it."""
        return F.pad(x, self.ends) if any(self.ends) else x

    def embed(self, weight_grad: Tensor) -> Tensor:
        """`[..., *cropped kernel]` -> `[..., *kernel]`, with zeros where nothing is alive."""
        return F.pad(weight_grad, self.dead)


@lru_cache(maxsize=4096)
def live_kernel(problem: WeightGradProblem) -> LiveKernel | None:
    """Return the smallest box of kernel offsets that holds all that is alive, or None if it is the whole."""
    g = problem.geometry
    assert g.kernel_size is not None
    kernel, padding, ends, dead, input_size = [], [], [], [], []
    for k, s, dil, (before, _), size, out in zip(
        g.kernel_size, g.stride, g.dilation, g.padding, problem.input_size, problem.output_size, strict=True
    ):
        alive = [d for d, alone in enumerate(meets_padding_alone(size, out, k, s, before, dil)) if not alone]
        first, last = (alive[0], alive[-1]) if alive else (0, k - 1)  # nothing alive: not worth a case
        kernel.append(last - first + 1)
        dead.append((first, k - 1 - last))
        # The first window moves by dil * first elements; the last one ends where T outputs need it.
        start = before - dil * first
        stop = s * (out - 1) + dil * (last - first) + 1 - size - start
        # One pair of equal numbers is a convolution's own padding; the rest is done to x.
        both = max(0, start)
        if (size + 2 * both - dil * (last - first) - 1) // s + 1 == out and start >= 0:
            stop = both
        else:
            both = max(0, min(start, stop))
        padding.append(both)
        ends.append((start - both, stop - both))
        input_size.append(size + start - both + stop - both)
    if not any(map(any, dead)):
        return None
    cropped = replace(
        problem,
        input_size=tuple(input_size),
        geometry=ConvGeometry(tuple(kernel), g.stride, padding, g.dilation, groups=g.groups),
    )
    return LiveKernel(cropped, _flat(ends), _flat(dead))


@lru_cache(maxsize=4096)
def worth_cropping(problem: WeightGradProblem, results: int) -> LiveKernel | None:
    """Return `live_kernel`, if what it saves is more than it costs to put zeros around so many gradients.

    Of a dense layer a cropped gradient is read, and written again among zeros: on 8 layers whose products
    are short (512-512 3x3 @1, 256-512 3x3/2 @2, 512-512 3x3x3 @1x4x4) 1.2 to 2.4 times as slow as the whole
    product, zeros included. Grouped layers are slow enough for cropping to pay at once.
    """
    live = live_kernel(problem)
    if live is None or problem.groups > 1:
        return live
    moved = results * (problem.gradient_bytes + 2 * live.problem.gradient_bytes)
    return live if problem.flops - live.problem.flops > FLOPS_PER_BYTE * moved else None


def live_for(problem: WeightGradProblem, verb: str) -> LiveKernel | None:
    """Return how a verb crops the kernel, or None if it does not: norms need no zeros put back."""
    return live_kernel(problem) if verb == "sq_norms" else worth_cropping(problem, problem.samples)


def _flat(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """Pairs by axis -> the order of `torch.nn.functional.pad`, last axis first."""
    return tuple(end for pair in reversed(pairs) for end in pair)
