"""S from R by one small matrix an axis, for inputs of few positions.

Shifting is linear in R: with `A[d, t, u] = 1` where kernel offset d takes output t to input u,

    S[t,t'] = sum_{u,u'} M[(t t'),(u u')] R[u,u'],    M = sum_d A[d,t,u] A[d,t',u'],

and M is a Kronecker product of one such matrix an axis. For few positions a product with it is one
call to BLAS where shifting is a dozen of copies; padding and stride are in the matrix.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from psgrad.conv.constants import as_it_is
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.gram.positions import positions_gram

__all__ = ["few_positions", "map_cost", "mapped"]

AXIS_ENTRIES = 64**2
"""Largest matrix of one axis, `(T U)^2`: beyond, shifting moves less than this multiplies."""
ALL_ENTRIES = 256**2
"""Largest matrix of all axes at once, which saves bringing R into the order of the axes."""


@lru_cache(maxsize=4096)
def few_positions(problem: WeightGradProblem) -> bool:
    """Whether the matrices are small, more than the identity, and read all of x.

    A position that no output reads must not enter: its zeros in M times what is not finite are NaN.
    """
    sizes = zip(problem.input_size, problem.output_size, strict=True)
    return (
        problem.geometry.kernel_positions > 1
        and all(0 < (u * t) ** 2 <= AXIS_ENTRIES for u, t in sizes)
        and all(_meets((axis,)).any((0, 1)).all() for axis in _axes(problem))
    )


def map_cost(problem: WeightGradProblem) -> tuple[float, float, int]:
    """FLOPs and elements moved for one sample, and calls for a chunk."""
    sizes, pairs = list(problem.input_size), problem.groups * problem.rows_per_sample**2
    flops = 2.0 * pairs * prod(sizes) ** 2 * problem.in_per_group
    if _at_once(problem):
        flops += 2.0 * pairs * (prod(sizes) * problem.positions) ** 2
        return flops, 0.0, 2
    moved = 4.0 * pairs * prod(sizes) ** 2
    for axis, out in enumerate(problem.output_size):
        flops += 2.0 * pairs * (prod(sizes) * out) ** 2
        sizes[axis] = out
    return flops, moved, 3 + len(sizes)


def mapped(x: Tensor, problem: WeightGradProblem) -> Tensor:
    """Gram matrix of the patches: `(NK)(GI)U.. -> (NG) (KT) (KT)`."""
    p = problem
    k, inputs, outputs = p.rows_per_sample, prod(p.input_size), p.positions
    gram = positions_gram(x, p, inputs)
    if k > 1:  # (KU)(KU') -> (KK') U U'
        gram = gram.reshape(-1, k, inputs, k, inputs).transpose(2, 3)
    if _at_once(p):
        s = gram.reshape(-1, inputs**2) @ _matrix(_axes(p), gram.dtype, gram.device)
    else:
        s = _axis_by_axis(gram, p)
    if k == 1:
        return s.reshape(-1, outputs, outputs)
    s = s.reshape(-1, k, k, outputs, outputs).transpose(2, 3)
    return s.reshape(-1, k * outputs, k * outputs)


def _axis_by_axis(gram: Tensor, problem: WeightGradProblem) -> Tensor:
    """.. U1 U2.. U1' U2'.. -> .. T1 T2.. T1' T2'.."""
    p, rank = problem, len(problem.input_size)
    pairs = [axis for a in range(rank) for axis in (1 + a, 1 + rank + a)]
    s = gram.reshape(-1, *p.input_size, *p.input_size).permute(0, *pairs)
    sizes = [u**2 for u in p.input_size]
    for axis, of_axis in enumerate(_axes(p)):
        matrix = _matrix((of_axis,), gram.dtype, gram.device)
        s = s.reshape(-1, sizes[axis], prod(sizes[axis + 1 :]))
        if axis == rank - 1:
            s = torch.mm(s.squeeze(2), matrix)
        else:
            s = torch.bmm(matrix.t().expand(len(s), -1, -1), s)
        sizes[axis] = matrix.shape[1]
    s = s.reshape(-1, *(size for out in p.output_size for size in (out, out)))
    return s.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))


Axis = tuple[int, int, int, int, int, int]
"""Kernel, stride, dilation, padding before, input size, output size."""


def _at_once(problem: WeightGradProblem) -> bool:
    return (prod(problem.input_size) * problem.positions) ** 2 <= ALL_ENTRIES


def _axes(problem: WeightGradProblem) -> tuple[Axis, ...]:
    g = problem.geometry
    assert g.kernel_size is not None
    before = [pair[0] for pair in g.padding]
    sizes = problem.input_size, problem.output_size
    return tuple(zip(g.kernel_size, g.stride, g.dilation, before, *sizes, strict=True))


@lru_cache(maxsize=256)
@as_it_is
def _matrix(axes: tuple[Axis, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """M over these axes together, transposed: `[U^2, T^2]`."""
    meets = _meets(axes).to(dtype)
    _, t, u = meets.shape
    return torch.einsum("dtu,dsv->uvts", meets, meets).reshape(u * u, t * t).to(device)


@lru_cache(maxsize=256)
@as_it_is
def _meets(axes: tuple[Axis, ...]) -> Tensor:
    """A over these axes together: bool `[k, T, U]`."""
    meets = torch.ones(1, 1, 1, dtype=torch.bool)
    for kernel, stride, dilation, before, size, out in axes:
        offset, t, u = torch.arange(kernel), torch.arange(out), torch.arange(size)
        read = stride * t[:, None] + dilation * offset[:, None, None] - before
        meets = torch.kron(meets, read == u)
    return meets
