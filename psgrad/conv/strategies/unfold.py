"""`unfold`: im2col and one batched matrix product over samples and groups."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.numerics import accumulation_dtype, squared_norms
from psgrad.conv.patches import patches
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.scratch import scratch
from psgrad.conv.strategies.base import Cost, Strategy, Verb, chunks, samples_per_chunk

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
        """F FLOPs; the unfolded copy is written and read, if there is one; a product per sample and group."""
        unfolded = self._unfolded_bytes(problem)
        chunk = samples_per_chunk(problem, unfolded)
        geometry = problem.geometry
        duplicates = geometry.kernel_positions > 1 and geometry.kernel_size != geometry.stride
        copied = 1.6 if duplicates else 0.4
        return Cost(
            flops=problem.flops,
            bytes=problem.samples * (copied * unfolded + 0.7 * problem.gradient_bytes),
            calls=2 + problem.samples * problem.groups // 30,
            peak_bytes=min(chunk, problem.samples) * unfolded,
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        return self._into(x.new_empty(problem.samples, *problem.weight_shape), x, grad, problem)

    def sq_norms(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.sq_norms`."""
        norms = x.new_empty(problem.samples, dtype=accumulation_dtype(x.dtype))
        largest = max(problem.gradient_bytes, self._unfolded_bytes(problem))
        for part, rows, here in chunks(problem, samples_per_chunk(problem, largest)):
            grads = scratch("gradients", (part.samples, *problem.weight_shape), x)
            norms[here] = squared_norms(self._into(grads, x[rows], grad[rows], part).flatten(1))
        return norms

    def _into(self, grads: Tensor, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        k, g = problem.rows_per_sample, problem.groups
        of_group = (problem.out_per_group, problem.weight_numel // (g * problem.out_per_group))
        out = grads.view(problem.samples, g, *of_group)
        for part, rows, here in chunks(problem, samples_per_chunk(problem, self._unfolded_bytes(problem))):
            # (nK)(GO)T -> nK GO T -> nGO KT -> nG O(KT)
            left = grad[rows].reshape(part.samples, k, g, problem.out_per_group, problem.positions)
            left = left.permute(0, 2, 3, 1, 4).flatten(3)
            # nG (Ik) (KT) -> nG (KT)(Ik)
            right = patches(x[rows], problem, part.samples).transpose(2, 3)
            torch.matmul(left, right, out=out[here])
        return grads

    @staticmethod
    def _unfolded_bytes(problem: WeightGradProblem) -> int:
        """Bytes of one sample's unfolded input."""
        window = problem.groups * problem.in_per_group * problem.geometry.kernel_positions
        return window * problem.positions * problem.rows_per_sample * problem.dtype.itemsize
