"""Im2col: the input elements that meet each kernel offset, in the order that a matrix product reads.

What is returned is good until the next call.
"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor

from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.scratch import scratch

__all__ = ["patches", "patches_by_position", "patches_by_row", "patches_by_window", "rows_of_phases"]


def patches(x: Tensor, problem: WeightGradProblem, samples: int) -> Tensor:
    """(NK)(GI)S -> N G (I k) (K T): the input element that meets kernel offset d at output t."""
    rank = len(problem.input_size)
    kernel, positions = range(4, 4 + rank), range(4 + rank, 4 + 2 * rank)
    ordered = _windows(x, problem, samples).permute(0, 2, 3, *kernel, 1, *positions)
    return _copied(
        ordered,
        samples,
        problem.groups,
        problem.in_per_group * problem.geometry.kernel_positions,
        problem.rows_per_sample * problem.positions,
    )


def patches_by_position(x: Tensor, problem: WeightGradProblem) -> Tensor:
    """(NK)(GI)S -> G (N K T) (I k): the same elements, of all samples together, positions first."""
    rank = len(problem.input_size)
    kernel, positions = range(4, 4 + rank), range(4 + rank, 4 + 2 * rank)
    ordered = _windows(x, problem, problem.samples).permute(2, 0, 1, *positions, 3, *kernel)
    return _copied(
        ordered,
        problem.groups,
        problem.samples * problem.rows_per_sample * problem.positions,
        problem.in_per_group * problem.geometry.kernel_positions,
    )


def patches_by_window(x: Tensor, problem: WeightGradProblem, samples: int) -> Tensor:
    """(NK)(GI)S -> N G (K T) (k I): the same elements, every output position's window in one piece.

    They are read from channels last, where the row of a window lies in one piece as well.
    """
    p, geometry = problem, problem.geometry
    rows = _channels_last(x, problem)
    row, *spatial, channel = rows.stride()
    assert geometry.kernel_size is not None
    windows = rows.as_strided(
        (samples, p.groups, p.rows_per_sample, *p.output_size, *geometry.kernel_size, p.in_per_group),
        (
            row * p.rows_per_sample,
            channel * p.in_per_group,
            row,
            *(s * d for s, d in zip(spatial, geometry.stride, strict=True)),
            *(s * d for s, d in zip(spatial, geometry.dilation, strict=True)),
            channel,
        ),
        rows.storage_offset(),
    )
    return _copied(
        windows,
        samples,
        p.groups,
        p.rows_per_sample * p.positions,
        geometry.kernel_positions * p.in_per_group,
    )


def patches_by_row(x: Tensor, problem: WeightGradProblem, samples: int) -> list[Tensor]:
    """N(GI)S -> (N G) T (k' I) for every element of the kernel's first axis, k' the rest of the kernel.

    All are views of one copy, in which windows have one element along the first axis: the windows that meet
    the kernel's next element there are those of the next row. Rows that a stride keeps apart lie apart.
    """
    p, geometry = problem, problem.geometry
    assert geometry.kernel_size is not None
    stride, where = geometry.stride[0], _rows_of_kernel(p)
    phases, down = rows_of_phases(p)
    rows = _channels_last(x, problem, (down - 1) * stride + phases)
    row, first, *rest, channel = rows.stride()
    windows = rows.as_strided(
        (samples, p.groups, phases, down, *p.output_size[1:], *geometry.kernel_size[1:], p.in_per_group),
        (
            row,
            channel * p.in_per_group,
            first,
            first * stride,
            *(s * d for s, d in zip(rest, geometry.stride[1:], strict=True)),
            *(s * d for s, d in zip(rest, geometry.dilation[1:], strict=True)),
            channel,
        ),
        rows.storage_offset(),
    )
    across, piece = prod(p.output_size[1:]), prod(geometry.kernel_size[1:]) * p.in_per_group
    copy = _copied(windows, samples * p.groups, phases, down * across, piece)
    return [copy[:, phase].narrow(1, rows_down * across, p.positions) for rows_down, phase in where]


def rows_of_phases(problem: WeightGradProblem) -> tuple[int, int]:
    """Of the first axis: how many phases of its stride `patches_by_row` copies, and how many rows of each."""
    where = _rows_of_kernel(problem)
    return 1 + max(phase for _, phase in where), problem.output_size[0] + where[-1][0]


def _rows_of_kernel(problem: WeightGradProblem) -> list[tuple[int, int]]:
    """Of every element of the kernel's first axis: how far down its rows begin, and in which phase."""
    geometry = problem.geometry
    assert geometry.kernel_size is not None
    return [divmod(k * geometry.dilation[0], geometry.stride[0]) for k in range(geometry.kernel_size[0])]


def _channels_last(x: Tensor, problem: WeightGradProblem, least: int = 0) -> Tensor:
    """(NK) C S.. -> (NK) S.. C, contiguous, with the problem's padding around it.

    Along the first spatial axis it has at least so many elements; more than there are hold anything.
    """
    padding = problem.geometry.symmetric_padding
    rows = x.movedim(1, -1)
    if not any(padding) and rows.is_contiguous() and rows.shape[1] >= least:
        return rows
    count, *sizes, channels = rows.shape
    padded = [size + 2 * p for size, p in zip(sizes, padding, strict=True)]
    padded[0] = max(padded[0], least)
    block = scratch("channels last", (count, *padded, channels), x)
    inner = block.zero_() if any(padding) else block
    for axis, (size, p) in enumerate(zip(sizes, padding, strict=True)):
        inner = inner.narrow(axis + 1, p, size)
    inner.copy_(rows)
    return block


def _copied(windows: Tensor, *shape: int) -> Tensor:
    if windows.is_contiguous():
        return windows.reshape(shape)
    return scratch("patches", tuple(windows.shape), windows).copy_(windows).view(shape)


def _windows(x: Tensor, problem: WeightGradProblem, samples: int) -> Tensor:
    """(NK)(GI)S -> N K G I k.. T.., a strided view of the padded input: its one copy is the caller's."""
    geometry = problem.geometry
    padding = [p for p in reversed(geometry.symmetric_padding) for _ in range(2)]
    padded = F.pad(x, padding) if any(padding) else x
    row, channel, *spatial = padded.stride()
    assert geometry.kernel_size is not None
    return padded.as_strided(
        (
            samples,
            problem.rows_per_sample,
            problem.groups,
            problem.in_per_group,
            *geometry.kernel_size,
            *problem.output_size,
        ),
        (
            row * problem.rows_per_sample,
            row,
            channel * problem.in_per_group,
            channel,
            *(s * d for s, d in zip(spatial, geometry.dilation, strict=True)),
            *(s * d for s, d in zip(spatial, geometry.stride, strict=True)),
        ),
        padded.storage_offset(),
    )
