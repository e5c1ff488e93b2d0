"""`unfold`: im2col and one batched matrix product over samples and groups."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from psgrad.conv.patches import patches, patches_by_window
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.reused import borrowed
from psgrad.conv.scratch import scratch
from psgrad.conv.strategies.base import Cost, Strategy, Verb, chunks, samples_per_chunk

__all__ = ["Unfold"]


class Unfold(Strategy):
    """`NG O(KT) @ NG (KT)(Ik) -> NG O(Ik)`, in chunks of samples.

    The unfolded copy of x never exceeds a budget (one sample's share excepted). Groups are kept
    apart, so that no product of one group with another is computed. Where the kernel is one
    element, or as large as the stride, nothing is duplicated.

    Where nobody minds the order of the result in memory, every window is copied in one piece, channels
    last, which both the copy and the product are faster with: `NG (KT)(kI)` instead of `NG (Ik)(KT)`.
    """

    name = "unfold"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Never refuse."""
        return None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs; the unfolded copy is written and read, if there is one; a product per sample and group."""
        p, unfolded = problem, _unfolded_bytes(problem)
        duplicates = p.geometry.kernel_positions > 1 and p.geometry.kernel_size != p.geometry.stride
        any_order = verb != "grads" or _has_one_order(p)
        copied = 0.4 if not duplicates else 0.6 if any_order and windows_are_faster(p) else 1.6
        written = 1.4 if verb == "sq_norms" else 0.7
        temporary = unfolded + (p.gradient_bytes if verb == "sq_norms" else 0)
        return Cost(
            flops=p.flops,
            bytes=p.samples * (copied * unfolded + written * p.gradient_bytes),
            calls=2 + (duplicates and p.in_per_group == 1) + p.samples * p.groups // 30,
            peak_bytes=min(self._chunk(p, verb), p.samples) * temporary,
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        return self._written(x, grad, problem, _has_one_order(problem) and windows_are_faster(problem))

    def kept(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.kept`."""
        return self._written(x, grad, problem, windows_are_faster(problem))

    def kept_in_chunks(
        self, x: Tensor, grad: Tensor, problem: WeightGradProblem
    ) -> Iterator[tuple[Tensor, slice]]:
        """See `Strategy.kept_in_chunks`; the gradients lie in memory that is used again and again."""
        by_window = windows_are_faster(problem)
        for part, rows, here in chunks(problem, self._chunk(problem, "sq_norms")):
            grads = scratch("gradients", _by_group(part), x)
            _products(x[rows], grad[rows], part, by_window, grads)
            yield _as_weights(grads, part, by_window), here

    def _written(self, x: Tensor, grad: Tensor, problem: WeightGradProblem, by_window: bool) -> Tensor:
        p = problem
        out = borrowed(_by_group(p), x)
        for part, rows, here in chunks(p, self._chunk(p, "grads")):
            _products(x[rows], grad[rows], part, by_window, out[here])
        return _as_weights(out, p, by_window)

    @staticmethod
    def _chunk(problem: WeightGradProblem, verb: Verb) -> int:
        """Samples at a time; for norms their gradients are temporary as well."""
        written = problem.gradient_bytes if verb == "sq_norms" else 0
        return samples_per_chunk(problem, _unfolded_bytes(problem) + written)


def _has_one_order(problem: WeightGradProblem) -> bool:
    return problem.in_per_group == 1 or problem.geometry.kernel_positions == 1


def windows_are_faster(problem: WeightGradProblem) -> bool:
    """Whether windows lie in memory in pieces at least as long as what they are read in without them.

    Channels last, a piece is the row of a window; otherwise a row of the output, as long as the stride
    lets it be read in one.
    """
    p, geometry = problem, problem.geometry
    assert geometry.kernel_size is not None
    if geometry.kernel_positions < prod(geometry.stride) or geometry.kernel_positions == 1:
        return False  # x would be brought channels last, of which only a part is read, or nothing copied
    whole_row = p.groups == 1 and geometry.dilation[-1] == 1
    piece = p.in_per_group * (geometry.kernel_size[-1] if whole_row else 1)
    return piece * geometry.stride[-1] >= p.output_size[-1]


def _products(x: Tensor, grad: Tensor, problem: WeightGradProblem, by_window: bool, out: Tensor) -> None:
    """Write NG O(KT) @ NG (KT)(Ik), or (kI) by window, to `out`."""
    p = problem
    # (NK)(GO)T -> NK GO T -> NGO KT -> NG O(KT)
    left = grad.reshape(p.samples, p.rows_per_sample, p.groups, p.out_per_group, p.positions)
    left = left.permute(0, 2, 3, 1, 4).flatten(3)
    right = patches_by_window(x, p, p.samples) if by_window else patches(x, p, p.samples).mT
    torch.matmul(left, right, out=out)


def _by_group(problem: WeightGradProblem) -> tuple[int, int, int, int]:
    """N G O (Ik)."""
    p = problem
    return p.samples, p.groups, p.out_per_group, p.in_per_group * p.geometry.kernel_positions


def _as_weights(grads: Tensor, problem: WeightGradProblem, by_window: bool) -> Tensor:
    """N G O (Ik), or (kI) by window, -> N (GO) I k."""
    p = problem
    if not by_window:
        return grads.view(p.samples, *p.weight_shape)
    channels_out, channels_in, *kernel = p.weight_shape
    return grads.view(p.samples, channels_out, *kernel, channels_in).movedim(-1, 2)


def _unfolded_bytes(problem: WeightGradProblem) -> int:
    """Bytes of one sample's unfolded input."""
    window = problem.groups * problem.in_per_group * problem.geometry.kernel_positions
    return window * problem.positions * problem.rows_per_sample * problem.dtype.itemsize
