"""`grouped`: the batch rule. One `convolution_backward` with a group for every sample."""

from __future__ import annotations

from math import prod

from torch import Tensor

from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.base import Cost, Strategy, Verb
from psgrad.conv.strategies.loop import ordinary_weight_grad

__all__ = ["Grouped"]


class Grouped(Strategy):
    """Samples folded into the channels: `K(NGO), K(NGI) -> (NGO)I k -> N(GO)I k`, groups N*G.

    On CUDA this is the cuDNN per-sample path, and the flags of `torch.backends.cudnn` hold for it.
    """

    name = "grouped"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Refuse an empty batch, which has no groups."""
        return "an empty batch has no groups" if problem.samples == 0 else None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs in one call, at the poor rate of grouped convolutions with many groups."""
        operands = (
            problem.samples
            * problem.rows_per_sample
            * problem.groups
            * (problem.in_per_group * prod(problem.input_size) + problem.out_per_group * problem.positions)
        )
        return Cost(
            flops=problem.flops,
            bytes=2 * operands * problem.dtype.itemsize + problem.samples * problem.gradient_bytes,
            calls=3,
            peak_bytes=operands * problem.dtype.itemsize if problem.rows_per_sample > 1 else 0,
            slowdown=3.0,
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        folded = ordinary_weight_grad(
            _fold_samples(x, problem), _fold_samples(grad, problem), problem, groups_factor=problem.samples
        )
        return folded.reshape(problem.samples, *problem.weight_shape).contiguous()


def _fold_samples(t: Tensor, problem: WeightGradProblem) -> Tensor:
    """(NK)C -> NKC -> KNC -> K(NC)."""
    return t.reshape(problem.samples, problem.rows_per_sample, *t.shape[1:]).movedim(0, 1).flatten(1, 2)
