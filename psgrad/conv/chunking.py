"""Chunks of samples, so large that their temporaries stay within a budget."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from psgrad.conv.problem import WeightGradProblem

__all__ = ["chunk_bytes", "chunks", "evenly", "samples_per_chunk"]

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""Temporaries, in bytes, that a strategy makes for a chunk of samples, by device type.

On a CPU, blocks of some 32 MiB come fresh from the system at every call, and touching them costs more
than the arithmetic on them. From 2 to 16 MiB the times hardly differ: 4 is what a small model can spare.
"""


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


def chunks(problem: WeightGradProblem, size: int) -> Iterator[tuple[WeightGradProblem, slice, slice]]:
    """Cut the problem into chunks of samples: the problem, the rows and the samples of each."""
    k = problem.rows_per_sample
    for start in range(0, problem.samples, size):
        stop = min(start + size, problem.samples)
        yield problem.with_samples(stop - start), slice(start * k, stop * k), slice(start, stop)
