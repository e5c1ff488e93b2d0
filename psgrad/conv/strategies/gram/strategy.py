"""`gram`: the norm of a weight gradient from two Gram matrices, without unfolding.

For one sample and group, with patches P_t of x and output gradients g_t,

    ||sum_t g_t P_t^T||^2 = sum_{t,t'} <g_t, g_t'> <P_t, P_t'> = sum_{t,t'} D[t,t'] S[t,t'].

S need not unfold x: with the Gram R[u,u'] = <x_u, x_u'> of single input positions,

    S[t,t'] = sum over kernel offsets d of R[s t + dil d - p, s t' + dil d - p],

a sum of shifted copies of R that separates axis by axis. With a stride s only input positions of one
residue class modulo s meet, so R is made per class; or, where windows hardly overlap, S of x unfolded. This
is the "ghost" norm of Bu et al. (2022) and Li et al. (2022) at the cost `T_in^2 C_in + T^2 C_out` in place of
`T^2 (C_in k + C_out)`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from psgrad.conv.chunking import chunk_bytes, chunks, samples_per_chunk
from psgrad.conv.library_bytes import numel_of_operands
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.patches import patches
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.products import mkl_slowdown
from psgrad.conv.strategies.base import Cost, Strategy, Verb
from psgrad.conv.strategies.gram.cancellation import eaten, norms_of_grams
from psgrad.conv.strategies.gram.mapped import few_positions, map_cost, mapped
from psgrad.conv.strategies.gram.positions import positions_gram
from psgrad.conv.strategies.gram.shifted import largest_phase, shift_cost, shifted
from psgrad.conv.strategies.gram.unfolded import few_overlap, unfolded, unfolded_cost
from psgrad.conv.strategies.loop import Loop

__all__ = ["Gram"]


class Gram(Strategy):
    """Squared norms from Gram matrices over positions; the gradients are never written.

    Wins where the positions K T are few against the channels. Sums are kept in float32 at least.
    """

    name = "gram"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Refuse gradients, depthwise convolutions and Gram matrices beyond the memory for temporaries."""
        if verb != "sq_norms":
            return "a Gram matrix gives norms, not gradients"
        if problem.in_per_group == 1 and problem.groups > 1:
            return "depthwise: a group has one channel, its gradient is smaller than a Gram matrix"
        budget = 8 * chunk_bytes(problem)
        if self._bytes(problem) > budget:
            return f"the Gram matrices of one sample take {self._bytes(problem)} bytes, over {budget}"
        return None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """Two Gram matrices, S from one of them, and the sum over their product."""
        p = problem
        side = p.rows_per_sample * p.positions
        flops, moved, calls = _WAYS[_way(p)][1](p)
        flops += 2.0 * side**2 * p.groups * p.out_per_group
        moved += 4.0 * p.groups * side**2
        dtype = accumulation_dtype(p.dtype)
        chunks = -(-p.samples // samples_per_chunk(p, self._bytes(p)))
        return Cost(
            flops=p.samples * flops,
            bytes=3.0 * p.samples * moved * dtype.itemsize,
            calls=chunks * (8 + calls) // 2,
            peak_bytes=min(samples_per_chunk(p, self._bytes(p)), p.samples) * self._bytes(p),
            slowdown=1.0 if _way(p) == "mapped" else mkl_slowdown(dtype, p.device),
            fast_in_half=True,
        )

    def bytes_of_one(self, one: WeightGradProblem, verb: Verb) -> int:
        """See `Strategy.bytes_of_one`; a gradient is made only where a norm is computed again."""
        numbers = numel_of_operands(one, 1) + one.weight_numel
        return 2 * (self.cost(one, verb).peak_bytes + accumulation_dtype(one.dtype).itemsize * numbers)

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """Never called: `refusal` says so."""
        raise NotImplementedError("gram refuses grads")

    def sq_norms(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.sq_norms`."""
        dtype = accumulation_dtype(x.dtype)
        if problem.rows_per_sample * problem.positions == 1:
            return _norms_of_one_position(x.to(dtype), grad.to(dtype), problem)
        chunk = samples_per_chunk(problem, self._bytes(problem))
        if chunk >= problem.samples > 0:
            norms, left = _norms(x.to(dtype), grad.to(dtype), problem)
        else:
            norms, left = (x.new_empty(problem.samples, dtype=dtype) for _ in range(2))
            for part, rows, here in chunks(problem, chunk):
                norms[here], left[here] = _norms(x[rows].to(dtype), grad[rows].to(dtype), part)
        for n in eaten(left):
            rows = slice(n * problem.rows_per_sample, (n + 1) * problem.rows_per_sample)
            norms[n] = Loop().sq_norms(x[rows], grad[rows], problem.with_samples(1))[0]
        return norms

    @staticmethod
    def _bytes(problem: WeightGradProblem) -> int:
        """Bytes of one sample's largest temporaries: D, S, and R with its sums."""
        p = problem
        if _way(p) == "unfolded":
            window = p.in_per_group * p.geometry.kernel_positions
            entries = p.rows_per_sample * p.positions * (2 * p.rows_per_sample * p.positions + window)
        else:
            inputs = prod(p.input_size) if _way(p) == "mapped" else largest_phase(p)
            entries = 2 * p.rows_per_sample**2 * (p.positions**2 + inputs**2)
        return p.groups * entries * accumulation_dtype(p.dtype).itemsize


def _norms_of_one_position(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
    """`||g_n x_n^T||^2 = |g_n|^2 |x_n|^2` for every group: N GO, N GI k -> N. Nothing cancels."""
    d = grad.reshape(problem.samples, problem.groups, problem.out_per_group)
    s = patches(x, problem, problem.samples).squeeze(3)
    return (torch.linalg.vecdot(d, d) * torch.linalg.vecdot(s, s)).sum(1)


def _norms(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> tuple[Tensor, Tensor]:
    """Squared norms `[N]`, and what is left of them above the share that cancellation may eat."""
    d = positions_gram(grad, problem, problem.positions)
    make, _ = _WAYS[_way(problem)]
    return norms_of_grams(d, make(x, problem), problem.groups)


_WAYS = {
    "unfolded": (unfolded, unfolded_cost),
    "mapped": (mapped, map_cost),
    "shifted": (shifted, shift_cost),
}
"""Of making S, with what each costs."""


def _way(problem: WeightGradProblem) -> str:
    if few_overlap(problem):
        return "unfolded"
    return "mapped" if few_positions(problem) and not _rounds_products(problem) else "shifted"


def _rounds_products(problem: WeightGradProblem) -> bool:
    """Whether matrix products may be of rounded operands (TF32, bfloat16), as PyTorch can be set to.

    D and S of rounded x and grad are those of one and the same gradient. But a map's operand is R itself, and
    where D S cancels, an R that is rounded gives another norm: with bfloat16 by up to a tenth.
    """
    backend = torch.backends.cuda if problem.device.type == "cuda" else torch.backends.mkldnn
    return problem.dtype != torch.float64 and backend.matmul.fp32_precision in ("tf32", "bf16")
