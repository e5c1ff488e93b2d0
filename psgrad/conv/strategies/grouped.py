"""`grouped`: the batch rule. One `convolution_backward` with a group for every sample."""

from __future__ import annotations

from torch import Tensor

from psgrad.conv.backend import backend_slowdown
from psgrad.conv.chunking import chunks, samples_per_chunk
from psgrad.conv.ordinary import ordinary_weight_grad
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.reused import borrowed
from psgrad.conv.strategies.base import Cost, Strategy, Verb

__all__ = ["Grouped"]


class Grouped(Strategy):
    """Samples folded into the channels: `K(NGO), K(NGI) -> (NGO)I k -> N(GO)I k`, groups N*G.

    On CUDA this is the cuDNN per-sample path, and the flags of `torch.backends.cudnn` hold for it. It
    runs in chunks of samples whose temporaries stay within a budget.
    """

    name = "grouped"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Refuse an empty batch, which has no groups."""
        return "an empty batch has no groups" if problem.samples == 0 else None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs in a call a chunk, at a backend's rate for its groups; a chunk's result is copied."""
        chunk = self._chunk(problem)
        written = WRITTEN[verb] * problem.gradient_bytes
        one_element = problem.geometry.kernel_positions == 1
        return Cost(
            flops=problem.flops,
            bytes=problem.samples * (problem.operand_bytes / 4 + written),
            calls=3 * -(-problem.samples // chunk),
            peak_bytes=min(chunk, problem.samples) * (problem.operand_bytes + problem.gradient_bytes),
            slowdown=backend_slowdown(problem) * (ONE_ELEMENT if one_element else 1.0),
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        chunk = self._chunk(problem)
        if chunk >= problem.samples:
            return _in_one_call(x, grad, problem).contiguous()
        out = borrowed((problem.samples, *problem.weight_shape), x)
        for part, rows, here in chunks(problem, chunk):
            out[here] = _in_one_call(x[rows], grad[rows], part)
        return out

    @staticmethod
    def _chunk(problem: WeightGradProblem) -> int:
        """Samples per call: a backend reorders about half of the operands, and makes the result.

        Twice what others have: of layers whose results are large, few groups a call are slow (0.78 to 0.97 of
        the time on nine of twelve layers, 1.13 on one, with 8 MiB in place of 4; 16 MiB vary more).
        """
        return samples_per_chunk(problem, (problem.operand_bytes // 2 + problem.gradient_bytes) // 2)


WRITTEN: dict[Verb, float] = {"grads": 2.0, "kept": 2.6, "sq_norms": 2.7}
"""Times that gradients are moved. Those that clipping keeps are made among the activations of a step, where
what a backend needs within its call comes fresh from the system: of a tanh CNN at N = 256 a step took 1.4x
of the ordinary one by `unfold` and 1.9x by this, which are as fast by themselves."""

ONE_ELEMENT = 1.2
"""Times as long takes a kernel of one element, which `unfold` copies nothing for."""


def _in_one_call(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
    folded = ordinary_weight_grad(
        _fold_samples(x, problem), _fold_samples(grad, problem), problem, groups_factor=problem.samples
    )
    return folded.reshape(problem.samples, *problem.weight_shape)


def _fold_samples(t: Tensor, problem: WeightGradProblem) -> Tensor:
    """(NK)C -> NKC -> KNC -> K(NC)."""
    return t.reshape(problem.samples, problem.rows_per_sample, *t.shape[1:]).movedim(0, 1).flatten(1, 2)
