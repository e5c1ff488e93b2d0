"""`loop`: one `convolution_backward` per sample."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from psgrad.conv.backend import backend_slowdown
from psgrad.conv.ordinary import as_product, ordinary_weight_grad
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.products import slowdown_of_products
from psgrad.conv.strategies.base import Cost, Strategy, Verb

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
        """F FLOPs in N calls at a backend's rate; of several samples every gradient is copied or squared."""
        p, one = problem, problem.with_samples(1)
        slowdown = backend_slowdown(one)
        if as_product(one) is not None:
            inner = p.rows_per_sample * p.positions
            slowdown = slowdown_of_products(one.flops / p.groups, inner, p.dtype, p.device, p.groups)
        if p.samples > 1 and p.groups > 1 and p.in_per_group > 1:
            slowdown *= 1.5  # one sample's groups keep threads less busy than all samples' do
        written = 1 if p.samples == 1 else 3
        return Cost(
            flops=p.flops,
            bytes=p.samples * (p.operand_bytes / 4 + written * p.gradient_bytes),
            calls=p.samples,
            peak_bytes=p.gradient_bytes,
            slowdown=slowdown,
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        if problem.samples == 1:
            return ordinary_weight_grad(x, grad, problem).contiguous().unsqueeze(0)
        out = x.new_empty(problem.samples, *problem.weight_shape)
        for weight_grad, here in self.kept_in_chunks(x, grad, problem):
            out[here] = weight_grad
        return out

    def kept_in_chunks(
        self, x: Tensor, grad: Tensor, problem: WeightGradProblem
    ) -> Iterator[tuple[Tensor, slice]]:
        """See `Strategy.kept_in_chunks`; one gradient is alive at a time."""
        if problem.samples == 1:
            yield ordinary_weight_grad(x, grad, problem).unsqueeze(0), slice(0, 1)
            return
        rows = problem.rows_per_sample
        for n in range(problem.samples):
            part = slice(n * rows, (n + 1) * rows)
            yield ordinary_weight_grad(x[part], grad[part], problem).unsqueeze(0), slice(n, n + 1)
