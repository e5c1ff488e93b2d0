"""What a strategy is: it answers (refusal, cost) before it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from psgrad.conv.chunking import chunks, samples_per_chunk
from psgrad.conv.library_bytes import backend_bytes
from psgrad.conv.numerics import RunningSum, accumulation_dtype, drop_removed, squared_norms
from psgrad.conv.problem import WeightGradProblem

__all__ = ["Cost", "Strategy", "Verb"]

Verb = Literal["grads", "kept", "sq_norms"]
"""Per-sample gradients; the same in any memory order, for who only squares and sums; their squared norms."""


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
    fast_in_half
        Whether half precision is as fast as float32 on every device: widened first, or no matrix product.

    """

    flops: float
    bytes: float
    calls: int
    peak_bytes: int
    slowdown: float = 1.0
    fast_in_half: bool = False


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

    def bytes_of_one(self, one: WeightGradProblem, verb: Verb) -> int:
        """Bound from above what a problem of one sample holds at once, for `memory_budget`.

        With whatever libraries make within their calls, which is here what a backend's convolution makes.
        """
        return self.cost(one, verb).peak_bytes + backend_bytes(one)

    @abstractmethod
    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """Per-sample gradients `[N, (G O), I, *k]`, in the dtype of x."""

    def kept(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """As `grads`, dense, but in any order of the axes in memory."""
        return self.grads(x, grad, problem)

    def kept_in_chunks(
        self, x: Tensor, grad: Tensor, problem: WeightGradProblem
    ) -> Iterator[tuple[Tensor, slice]]:
        """`kept` of a few samples after the others, and whose they are; good until the next is asked for."""
        for part, rows, here in chunks(problem, samples_per_chunk(problem, problem.gradient_bytes)):
            yield self.kept(x[rows], grad[rows], part), here

    def sq_norms(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """Squared norms `[N]`, float32 at least, from per-sample gradients made in chunks."""
        parts = [squared_norms(grads) for grads, _ in self.kept_in_chunks(x, grad, problem)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else x.new_empty(0, dtype=accumulation_dtype(x.dtype))

    def sq_norms_and_sum(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> tuple[Tensor, Tensor]:
        """Squared norms as of `sq_norms`, and the plain sum, from the same gradients of N > 0 samples."""
        norms, total = [], RunningSum(x.dtype)
        for grads, _ in self.kept_in_chunks(x, grad, problem):
            norms.append(squared_norms(grads))
            total.add(grads, grads.new_ones(len(grads)))
        return torch.cat(norms), total.value()

    def weighted_sum(self, x: Tensor, grad: Tensor, problem: WeightGradProblem, factors: Tensor) -> Tensor:
        """`sum_n factors[n] * grads[n]` of N > 0 samples, from gradients made in chunks; 0 removes one."""
        if problem.samples == 1:
            only = drop_removed(self.kept(x, grad, problem), factors)
            return (only[0] * factors.to(only.dtype)).contiguous()
        total = RunningSum(x.dtype)
        for grads, here in self.kept_in_chunks(x, grad, problem):
            part = factors[here]
            total.add(drop_removed(grads, part), part.to(grads.dtype))
        return total.value()
