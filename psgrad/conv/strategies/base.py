"""What a strategy is: it answers (refusal, cost) before it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from psgrad.conv.numerics import accumulation_dtype, squared_norms
from psgrad.conv.problem import WeightGradProblem

__all__ = ["Cost", "Strategy", "Verb"]

Verb = Literal["grads", "sq_norms"]

CHUNK_BYTES = 64 * 2**20
"""Largest temporary, in bytes, that a strategy makes for chunks of samples."""


@dataclass(frozen=True)
class Cost:
    """What a strategy would spend on a problem.

    Attributes
    ----------
    flops
        Multiply-adds, counted twice.
    bytes
        Bytes read and written by the operations, temporaries included.
    calls
        Operator launches.
    peak_bytes
        Largest temporary memory, the result not counted.
    slowdown
        How many times slower than a good matrix product the arithmetic runs on this device.

    """

    flops: float
    bytes: float
    calls: int
    peak_bytes: int
    slowdown: float = 1.0


class Strategy(ABC):
    """One way of computing per-sample weight gradients of a plain convolution.

    Tensors come as `normalise` returns them. A strategy keeps no state.
    """

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Why this strategy cannot serve the problem, or None if it can."""

    @abstractmethod
    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """Return what the verb would cost."""

    @abstractmethod
    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """Per-sample gradients `[N, (G O), I, *k]`, in the dtype of x."""

    def sq_norms(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """Squared norms `[N]`, float32 at least, from per-sample gradients made in chunks."""
        chunk = samples_within(CHUNK_BYTES, problem.gradient_bytes)
        rows = chunk * problem.rows_per_sample
        norms = x.new_empty(problem.samples, dtype=accumulation_dtype(x.dtype))
        for start in range(0, problem.samples, chunk):
            x_chunk = x[start * problem.rows_per_sample :][:rows]
            grad_chunk = grad[start * problem.rows_per_sample :][:rows]
            part = with_samples(problem, min(chunk, problem.samples - start))
            grads = self.grads(x_chunk, grad_chunk, part).flatten(1)
            norms[start : start + chunk] = squared_norms(grads)
        return norms


def samples_within(budget: int, bytes_per_sample: int) -> int:
    """How many samples' temporaries fit a budget in bytes: at least one."""
    return max(1, budget // max(1, bytes_per_sample))


def with_samples(problem: WeightGradProblem, samples: int) -> WeightGradProblem:
    """Return the same problem for another number of samples."""
    return replace(problem, samples=samples)
