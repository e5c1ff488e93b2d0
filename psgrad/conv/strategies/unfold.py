"""`unfold`: im2col and one batched matrix product over samples and groups."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.patches import patches
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.base import Cost, Strategy, Verb, samples_per_chunk

__all__ = ["Unfold"]


class Unfold(Strategy):
    """`NG O(KT) @ NG (KT)(Ik) -> NG O(Ik)`, in chunks of samples.

    The unfolded copy of x never exceeds a budget (one sample's share excepted). Groups are kept
    apart, so that no product of one group with another is computed. Where the kernel is one
    element, or as large as the stride, nothing is duplicated.
    """

    name = "unfold"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Never refuse."""
        return None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs; the unfolded copy is written, and read from cache; a product per sample and group."""
        unfolded = self._unfolded_bytes(problem)
        chunk = samples_per_chunk(problem, unfolded)
        copied = 1.35 if problem.geometry.kernel_positions > 1 else 0.35
        return Cost(
            flops=problem.flops,
            bytes=problem.samples * (copied * unfolded + 0.35 * problem.gradient_bytes),
            calls=3 + problem.samples * problem.groups // 30,
            peak_bytes=min(chunk, problem.samples) * unfolded,
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        n, k, g = problem.samples, problem.rows_per_sample, problem.groups
        out = x.new_empty(n, g, problem.out_per_group, problem.weight_numel // (g * problem.out_per_group))
        chunk = samples_per_chunk(problem, self._unfolded_bytes(problem))
        for start in range(0, n, chunk):
            count = min(chunk, n - start)
            rows = slice(start * k, (start + count) * k)
            # (nK)(GO)T -> nK GO T -> nGO KT -> nG O(KT)
            left = grad[rows].reshape(count, k, g, problem.out_per_group, problem.positions)
            left = left.permute(0, 2, 3, 1, 4).flatten(3)
            # nG (Ik) (KT) -> nG (KT)(Ik)
            right = patches(x[rows], problem, count).transpose(2, 3)
            torch.matmul(left, right, out=out[start : start + count])
        return out.reshape(n, *problem.weight_shape)

    @staticmethod
    def _unfolded_bytes(problem: WeightGradProblem) -> int:
        """Bytes of one sample's unfolded input."""
        window = problem.groups * problem.in_per_group * problem.geometry.kernel_positions
        return window * problem.positions * problem.rows_per_sample * problem.dtype.itemsize
