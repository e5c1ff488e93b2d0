"""`loop`: one `convolution_backward` per sample."""

from __future__ import annotations

from torch import Tensor

from psgrad.conv.numerics import accumulation_dtype, squared_norms
from psgrad.conv.ordinary import as_product, ordinary_weight_grad
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.base import (
    Cost,
    Strategy,
    Verb,
    backend_slowdown,
    operand_bytes,
    with_samples,
)

__all__ = ["Loop"]


class Loop(Strategy):
    """The ordinary weight gradient of every sample's rows, one after the other.

    Always right, and what the others are held against: each call is one well-tuned oneDNN primitive
    and the result goes into a preallocated buffer. Threads over samples were measured and left out: they
    halve its time, but `grouped` and `unfold` are there already (docs/strategies.md).
    """

    name = "loop"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Never refuse."""
        return None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs in N calls at a backend's rate; every gradient is made, then copied or squared."""
        product = as_product(with_samples(problem, 1)) is not None
        return Cost(
            flops=problem.flops,
            bytes=problem.samples * (operand_bytes(problem) / 4 + 3 * problem.gradient_bytes),
            calls=problem.samples,
            peak_bytes=problem.gradient_bytes,
            slowdown=1.0 if product else backend_slowdown(problem),
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        out = x.new_empty(problem.samples, *problem.weight_shape)
        rows = problem.rows_per_sample
        for n in range(problem.samples):
            part = slice(n * rows, (n + 1) * rows)
            out[n] = ordinary_weight_grad(x[part], grad[part], problem)
        return out

    def sq_norms(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.sq_norms`; one gradient is alive at a time."""
        out = x.new_empty(problem.samples, dtype=accumulation_dtype(x.dtype))
        rows = problem.rows_per_sample
        for n in range(problem.samples):
            part = slice(n * rows, (n + 1) * rows)
            weight_grad = ordinary_weight_grad(x[part], grad[part], problem)
            out[n] = squared_norms(weight_grad.reshape(1, -1))[0]
        return out
