"""`unfold`: im2col and one batched matrix product over samples and groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from psgrad.conv.chunking import chunks, samples_per_chunk
from psgrad.conv.half import is_emulated
from psgrad.conv.library_bytes import numel_of_operands
from psgrad.conv.numerics import accumulation_dtype
from psgrad.conv.patches import patches, patches_by_row, patches_by_window, rows_of_phases
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.processor import halves_long_vectors
from psgrad.conv.products import batched, by_onednn, mkl_slowdown, slowdown_of_products
from psgrad.conv.reused import borrowed
from psgrad.conv.scratch import scratch
from psgrad.conv.strategies.base import Cost, Strategy, Verb

__all__ = ["Unfold"]


Order = Literal["position", "window", "row"]
"""Of the unfolded copy: output positions innermost; windows in one piece; rows of windows in one piece."""


class Unfold(Strategy):
    """`NG O(KT) @ NG (KT)(Ik) -> NG O(Ik)`, in chunks of samples.

    The unfolded copy of x never exceeds a budget (one sample's share excepted). Groups are kept
    apart, so that no product of one group with another is computed. Where the kernel is one
    element, or as large as the stride, nothing is duplicated.

    Where nobody minds the order of the result in memory, every window is copied in one piece, channels
    last, which both the copy and the product are faster with: `NG (KT)(kI)` instead of `NG (Ik)(KT)`. And
    where a kernel has several rows, only what one of them meets is copied, and there is a product for each:
    the next one's windows are the same, one row of the output further on.

    On a CPU without instructions for half precision a chunk is widened to float32, its result rounded once.
    """

    name = "unfold"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Never refuse."""
        return None

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs; the unfolded copy is written and read, if there is one; a product per sample and group."""
        p, order = _widened(problem), order_for(problem, verb)
        unfolded = _unfolded_bytes(p, order)
        duplicates = _duplicates(p)
        copied = 0.4 if not duplicates else 1.6 if order == "position" else 0.6
        written = 1.4 if verb == "sq_norms" else 0.7
        moved = copied * unfolded + written * p.gradient_bytes
        if verb == "sq_norms" and mkl_slowdown(p.dtype, p.device) > 1:
            moved *= ONEDNN_MOVES
        temporary = unfolded + (p.gradient_bytes if _is_temporary(problem, verb) else 0)
        return Cost(
            flops=p.flops,
            bytes=p.samples * moved,
            calls=2 + (duplicates and p.in_per_group == 1) + p.samples * p.groups // 30,
            slowdown=_slowdown(p, verb) * _slowdown_of_products(p, order, verb),
            peak_bytes=min(self._chunk(problem, verb), p.samples) * temporary,
            fast_in_half=True,
        )

    def bytes_of_one(self, one: WeightGradProblem, verb: Verb) -> int:
        """See `Strategy.bytes_of_one`."""
        copies = 2 if one.dtype.itemsize >= 4 else 3
        numbers = 2 * numel_of_operands(one, 1) + 3 * one.weight_numel
        made = copies * _unfolded_bytes(one, "position") + accumulation_dtype(one.dtype).itemsize * numbers
        return self.cost(one, verb).peak_bytes + made

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        return self._written(x, grad, problem, "grads")

    def kept(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.kept`."""
        return self._written(x, grad, problem, "kept")

    def kept_in_chunks(
        self, x: Tensor, grad: Tensor, problem: WeightGradProblem
    ) -> Iterator[tuple[Tensor, slice]]:
        """See `Strategy.kept_in_chunks`; the gradients lie in memory that is used again and again."""
        order, p = _order_in_memory(x, problem, "sq_norms"), _widened(problem)
        as_made = _as_made(p, order)
        for part, rows, here in chunks(p, 1 if as_made else self._chunk(problem, "sq_norms")):
            left, right = x[rows].to(p.dtype), grad[rows].to(p.dtype)
            out = None if as_made else scratch("gradients", _shape(part, order), left)
            yield _as_weights(_products(left, right, part, order, out), part, order), here

    def _written(self, x: Tensor, grad: Tensor, problem: WeightGradProblem, verb: Verb) -> Tensor:
        order, p = _order_in_memory(x, problem, verb), _widened(problem)
        if p.samples == 1 and _as_made(p, order):
            return _as_weights(_products(x, grad, p, order), p, order)
        out = borrowed(_shape(p, order), x)
        for part, rows, here in chunks(p, self._chunk(problem, verb)):
            if p.dtype == out.dtype:
                _products(x[rows], grad[rows], part, order, out[:, here])
                continue
            left, right = x[rows].to(p.dtype), grad[rows].to(p.dtype)
            wide = scratch("gradients", _shape(part, order), left)
            _products(left, right, part, order, wide)
            out[:, here] = wide
        return _as_weights(out, p, order)

    @staticmethod
    def _chunk(problem: WeightGradProblem, verb: Verb) -> int:
        """Samples at a time; for norms their gradients are temporary as well."""
        p, order = _widened(problem), order_for(problem, verb)
        written = p.gradient_bytes if _is_temporary(problem, verb) else 0
        return samples_per_chunk(p, _unfolded_bytes(p, order) + written)


ALONE, ALONE_ON_FEW, STRIDED = 1.05, 1.25, 1.1
"""Times as long takes one sample's product, which threads share, that of few positions, and norms where a
strided kernel overlaps.

Fitted to 157 to 432 cells on CPUs of three makes: on none of them fewer choices are within 10 % of the best.
"""
FEW_POSITIONS = 16
THIN = 16
"""Columns below which MKL, where it is slow, takes twice the time."""
THIN_ROWS_IN_HALVES = 24
"""The same for rows of a kernel on a CPU with vectors in halves: of 64 columns products have 165 GFLOP/s, of
32 155, of 17 to 23 80 to 105, of 15 50, of 8 28 (Zen 4, 64 samples, 32 rows)."""

ONEDNN_MOVES = 1.6
"""Times as much is moved for norms where oneDNN makes products, which take no place to write to."""
CALLS = 4
"""Times as large as for oneDNN a product must be for its sample to be unfolded and squared on its own.

A batch of one is so anyhow: 0.65 to 0.93 of the time without the copy (Zen 4, six layers, 26 to 58 MFLOPs).
"""

ROW_BYTES = 2**20
"""Of windows, for every row of the kernel, from where a product for each is worth its call."""


@lru_cache(maxsize=4096)
def _widened(problem: WeightGradProblem) -> WeightGradProblem:
    """The problem in the dtype of its products: half precision that would be emulated is widened."""
    return replace(problem, dtype=torch.float32) if is_emulated(problem.dtype, problem.device) else problem


def _slowdown(problem: WeightGradProblem, verb: Verb) -> float:
    p = problem
    few = p.positions <= FEW_POSITIONS and p.geometry.kernel_positions > 1
    alone = (ALONE_ON_FEW if few else ALONE) if p.samples == 1 else 1.0
    strided = max(p.geometry.stride) > 1 and _duplicates(p)
    thin = mkl_slowdown(p.dtype, p.device) > 1 and p.weight_numel < THIN * p.groups * p.out_per_group
    return alone * (STRIDED if strided and verb == "sq_norms" else 1.0) * (2.0 if thin else 1.0)


def _slowdown_of_products(problem: WeightGradProblem, order: Order, verb: Verb) -> float:
    p = problem
    alone = p.samples == 1 or (verb == "sq_norms" and _as_made(p, order))
    products = p.groups * (1 if alone else p.samples)
    return slowdown_of_products(*_one_product(p, order), p.dtype, p.device, products)


def _is_temporary(problem: WeightGradProblem, verb: Verb) -> bool:
    """Whether gradients as they are computed are not yet the result."""
    return verb == "sq_norms" or _widened(problem).dtype != problem.dtype


def _duplicates(problem: WeightGradProblem) -> bool:
    """Whether windows overlap, so that the unfolded copy is larger than x."""
    geometry = problem.geometry
    return geometry.kernel_positions > 1 and geometry.kernel_size != geometry.stride


def _order_in_memory(x: Tensor, problem: WeightGradProblem, verb: Verb) -> Order:
    """`order_for`; but windows that do not overlap are copied once, in the order that x itself lies in."""
    order = order_for(problem, verb)
    if order == "window" and not _duplicates(problem) and not x.movedim(1, -1).is_contiguous():
        return "position"
    return order


@lru_cache(maxsize=4096)
def order_for(problem: WeightGradProblem, verb: Verb) -> Order:
    """Return the order of the unfolded copy that makes the verb fastest."""
    p = problem
    if verb == "grads" and p.in_per_group > 1 and p.geometry.kernel_positions > 1:
        return "position"  # as weights lie
    if not windows_are_faster(p):
        return "position"
    return "row" if verb != "grads" and rows_are_faster(p) else "window"


def rows_are_faster(problem: WeightGradProblem) -> bool:
    """Whether a kernel's rows had better be unfolded and multiplied apart, where windows are faster at all.

    Fitted to 207 problems. The copy must be what takes the time: less than half as large by row, large enough
    for several calls, and read more often than the gradients, which are made in parts, are written. Nor may a
    row's products be so thin that they lose more than the copy gains.
    """
    p = problem
    if p.device.type != "cpu" or p.rows_per_sample > 1 or len(p.input_size) == 1:
        return False
    assert p.geometry.kernel_size is not None
    if mkl_slowdown(p.dtype, p.device) > 1:
        least = THIN_ROWS_IN_HALVES if halves_long_vectors() else THIN
        if _shape(p, "row")[4] < least:
            return False
    whole, by_row = _unfolded_bytes(p, "window"), _unfolded_bytes(p, "row")
    large = p.samples * whole >= p.geometry.kernel_size[0] * ROW_BYTES
    return whole > 2 * by_row and large and 2 * p.positions >= p.out_per_group


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


def _one_product(problem: WeightGradProblem, order: Order) -> tuple[float, int]:
    """FLOPs of one of the products, and how many elements it adds up for each of its own."""
    p = problem
    inner = p.rows_per_sample * p.positions
    return 2.0 * p.out_per_group * _shape(p, order)[4] * inner, inner


@lru_cache(maxsize=4096)
def _as_made(problem: WeightGradProblem, order: Order) -> bool:
    """Whether a sample's gradient is left where its product was made: oneDNN's take no place to write to."""
    p, (flops, inner) = problem, _one_product(problem, order)
    calls = CALLS if p.samples > 1 else 1
    return order != "row" and p.groups == 1 and by_onednn(flops / calls, inner, p.dtype, p.device, 1)


def _products(
    x: Tensor, grad: Tensor, problem: WeightGradProblem, order: Order, out: Tensor | None = None
) -> Tensor:
    """NG O(KT) @ NG (KT)(Ik), or its part for every row of the kernel, in `out` if there is one."""
    p = problem
    # (NK)(GO)T -> NK GO T -> NGO KT -> NG O(KT)
    left = grad.reshape(p.samples, p.rows_per_sample, p.groups, p.out_per_group, p.positions)
    left = left.permute(0, 2, 3, 1, 4).flatten(3)
    if order == "row":
        out = grad.new_empty(_shape(p, order)) if out is None else out
        left = left.flatten(0, 1)
        for part, right in zip(out.flatten(1, 2), patches_by_row(x, p, p.samples), strict=True):
            batched(left, right, part)
        return out
    right = patches_by_window(x, p, p.samples) if order == "window" else patches(x, p, p.samples).mT
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if out is None:
        return batched(left, right).view(_shape(p, order))
    batched(left, right, out[0].flatten(0, 1))
    return out


def _shape(problem: WeightGradProblem, order: Order) -> tuple[int, ...]:
    """Of the products, k N G O (k' I): by row the kernel's first axis lies outside of the samples."""
    p = problem
    assert p.geometry.kernel_size is not None
    apart = p.geometry.kernel_size[0] if order == "row" else 1
    return apart, p.samples, p.groups, p.out_per_group, p.in_per_group * p.geometry.kernel_positions // apart


def _as_weights(grads: Tensor, problem: WeightGradProblem, order: Order) -> Tensor:
    """`_shape`'s, the elements of a window in the order's order, -> N (GO) I k."""
    p = problem
    if order == "position":
        return grads.view(p.samples, *p.weight_shape)
    channels_out, channels_in, *kernel = p.weight_shape
    if order == "window":
        return grads.view(p.samples, channels_out, *kernel, channels_in).movedim(-1, 2)
    first, *rest = kernel
    return grads.view(first, p.samples, channels_out, *rest, channels_in).movedim((0, -1), (3, 2))


def _unfolded_bytes(problem: WeightGradProblem, order: Order) -> int:
    """Bytes of one sample's unfolded input."""
    p, geometry = problem, problem.geometry
    window = p.groups * p.in_per_group * geometry.kernel_positions * p.dtype.itemsize
    if order != "row":
        return window * p.positions * p.rows_per_sample
    assert geometry.kernel_size is not None
    phases, down = rows_of_phases(p)
    return window // geometry.kernel_size[0] * phases * down * prod(p.output_size[1:])
