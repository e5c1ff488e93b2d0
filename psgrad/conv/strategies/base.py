"""What a strategy is: it answers (refusal, cost) before it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from psgrad.conv.numerics import RunningSum, accumulation_dtype, drop_removed, squared_norms
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.products import mkl_slowdown

__all__ = ["Cost", "Strategy", "Verb"]

Verb = Literal["grads", "kept", "sq_norms"]
"""Per-sample gradients; the same in any memory order, for who only squares and sums; their squared norms."""

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""Temporaries, in bytes, that a strategy makes for a chunk of samples, by device type.

On a CPU, blocks of some 32 MiB come fresh from the system at every call, and touching them costs more
than the arithmetic on them. From 2 to 16 MiB the times hardly differ: 4 is what a small model can spare.
"""


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


def samples_per_chunk(problem: WeightGradProblem, bytes_per_sample: int) -> int:
    """How many samples to take at a time: temporaries within the device's budget, chunks alike in size.

    At least one sample, however large. On a CPU as many as keep all threads busy, where the budget holds
    them: three products on two threads take as long as four.
    """
    most = max(1, chunk_bytes(problem) // max(1, bytes_per_sample))
    return evenly(problem.samples, most, 1 if problem.device.type == "cuda" else torch.get_num_threads())


def evenly(samples: int, most: int, threads: int) -> int:
    """How many samples to take at a time, at most so many: chunks alike, multiples of the threads."""
    threads = min(most, threads)
    most -= most % threads
    chunks = max(1, -(-samples // most))
    alike = -(-samples // chunks)
    return max(1, min(samples, -(-alike // threads) * threads))


def chunk_bytes(problem: WeightGradProblem) -> int:
    """Budget for temporaries on the problem's device."""
    return CHUNK_BYTES["cuda" if problem.device.type == "cuda" else "cpu"]


def backend_slowdown(problem: WeightGradProblem) -> float:
    """How many times slower than a matrix product a backend's convolutions make per-sample gradients.

    Fitted, with the strategies' bytes and calls, to the CPU times of 620 problems: oneDNN vectorises over
    channels, and loses what a group has not; a batch of one it parallelises best, if it is not strided, but
    of 3-D layers unfolds it; 1-D layers are slow; of depthwise layers it knows 3x3 kernels best. For CUDA
    nothing was fitted yet.
    """
    p, rank = problem, len(problem.input_size)
    if p.device.type == "cuda":
        return 3.0
    if p.weight_numel == 0:
        return 1.0
    if p.in_per_group == 1 and p.out_per_group < 8 and p.groups > 1:
        return 12.0 if p.geometry.kernel_size == (3, 3) else 32.0 if rank == 1 else 45.0
    slow_products = mkl_slowdown(p.dtype, p.device) > 1
    slowdown = 2.0 if rank == 1 and (p.in_per_group == 1 or not slow_products) else 1.0
    if p.samples == p.rows_per_sample == 1 and rank == 2 and max(p.geometry.stride) > 1:
        slowdown = 1.25
    elif slow_products and p.samples == p.rows_per_sample == 1 and rank == 2 and 32 < p.positions <= 64:
        slowdown = 1.5
    elif p.samples == 1 and rank == 3 and p.geometry.kernel_positions > 1 and p.in_per_group >= 16:
        dear = slow_products and p.rows_per_sample == 1
        slowdown = 1 + (200 if dear else 50) / p.out_per_group  # the price of an unfolded copy
    if p.out_per_group < 8:
        return slowdown * (50.0 if p.out_per_group < 4 else 20.0)
    if p.in_per_group == 8 and p.dtype.itemsize <= 4:  # a part of a vector of them, and a kernel of its own
        return slowdown * (1.5 if p.dtype.itemsize == 4 else 8.0)
    if p.in_per_group < 16 and p.samples > 1:
        return slowdown * max(1.0, 192 / p.out_per_group)
    return slowdown * (2.0 if p.out_per_group < 16 else 1.0)


def ordinary_slowdown(problem: WeightGradProblem) -> float:
    """How many times slower than a good matrix product a backend makes the sum over all of the problem."""
    p = problem
    one = backend_slowdown(replace(p, samples=1, rows_per_sample=p.samples * p.rows_per_sample))
    slow_alone = len(p.input_size) == 1 and p.groups == 1  # as 1-D layers are
    if p.in_per_group == 1 and mkl_slowdown(p.dtype, p.device) > 1:
        slow_alone = False
    return one / 2 if slow_alone else one


def operand_bytes(problem: WeightGradProblem) -> int:
    """Bytes of one sample's rows of x and grad."""
    p = problem
    channels = p.in_per_group * prod(p.input_size) + p.out_per_group * p.positions
    return p.rows_per_sample * p.groups * channels * p.dtype.itemsize


def chunks(problem: WeightGradProblem, size: int) -> Iterator[tuple[WeightGradProblem, slice, slice]]:
    """Cut the problem into chunks of samples: the problem, the rows and the samples of each."""
    k = problem.rows_per_sample
    for start in range(0, problem.samples, size):
        stop = min(start + size, problem.samples)
        yield with_samples(problem, stop - start), slice(start * k, stop * k), slice(start, stop)


def with_samples(problem: WeightGradProblem, samples: int) -> WeightGradProblem:
    """Return the same problem for another number of samples."""
    return replace(problem, samples=samples)
