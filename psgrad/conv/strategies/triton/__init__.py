"""`triton`: the weight gradient as one implicit matrix product, for CUDA."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from psgrad.conv.library_bytes import numel_of_operands
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.base import Cost, Strategy, Verb

__all__ = ["Triton"]


class Triton(Strategy):
    """The sample and group in the grid of a Triton kernel that reads patches of x in place.

    Nothing is unfolded. The first problem of a kind compiles and times a few tiles, some seconds in all
    (`TRITON_PRINT_AUTOTUNING=1` tells); later processes find the fastest on disk. Norms come from an
    epilogue that squares and sums each tile and writes one number per tile, so that gradients are never in
    memory. float32 operands are multiplied exactly ("ieee") unless PyTorch is allowed to use TF32 both for
    convolutions and for products: `fp32_precision` of `torch.backends.cudnn.conv` and of
    `torch.backends.cuda.matmul`, which PyTorch's older settings set as well.
    """

    name = "triton"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Refuse other devices (but for Triton's interpreter), float64, and empty batches."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if problem.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"Triton compiles for CUDA; the tensors are on {problem.device}"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the kernel multiplies float32, bfloat16 and float16, not {problem.dtype}"
        return "an empty batch launches nothing" if problem.samples == 0 else None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs in one launch; x and g are read once per kernel offset, mostly from cache."""
        p = problem
        operands = p.samples * p.rows_per_sample * p.positions * p.groups * (p.in_per_group + p.out_per_group)
        written = 4 * p.samples if verb == "sq_norms" else p.samples * p.gradient_bytes
        return Cost(
            flops=p.flops,
            bytes=operands * p.dtype.itemsize + written,
            calls=2 if verb == "sq_norms" else 1,
            peak_bytes=0,
            slowdown=2.0 if p.device.type == "cuda" else 1e6,  # the interpreter is for tests
        )

    def bytes_of_one(self, one: WeightGradProblem, verb: Verb) -> int:
        """See `Strategy.bytes_of_one`."""
        return accumulation_dtype(one.dtype).itemsize * (numel_of_operands(one, 1) + 2 * one.weight_numel)

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        return self._launch(x, grad, problem, store=True)

    def sq_norms(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.sq_norms`."""
        return self._launch(x, grad, problem, store=False)

    @staticmethod
    def _launch(x: Tensor, grad: Tensor, problem: WeightGradProblem, *, store: bool) -> Tensor:
        from psgrad.conv.strategies.triton.launch import launch  # triton may be missing: only when asked

        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # of a module made at import
        allowed = {convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision}
        precision = "tf32" if allowed == {"tf32"} else "ieee"
        grads, norms = launch(x, grad, problem, store=store, square=not store, precision=precision)
        result = grads if store else norms
        assert result is not None
        return result
