"""Im2col."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from psgrad.conv.problem import WeightGradProblem

__all__ = ["patches"]


def patches(x: Tensor, problem: WeightGradProblem, samples: int) -> Tensor:
    """Im2col: `(NK)(GI)S -> N G (I k) (K T)`, the input element that meets kernel offset d at output t.

    The windows are a strided view of the padded input; the copy is made once, in the order that the
    matrix product reads.
    """
    geometry = problem.geometry
    padding = [p for p in reversed(geometry.symmetric_padding) for _ in range(2)]
    padded = F.pad(x, padding) if any(padding) else x
    rank = padded.ndim - 2
    row, channel, *spatial = padded.stride()
    assert geometry.kernel_size is not None
    windows = padded.as_strided(
        # N K G I k.. T..
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
    kernel_axes = range(4, 4 + rank)
    position_axes = range(4 + rank, 4 + 2 * rank)
    ordered = windows.permute(0, 2, 3, *kernel_axes, 1, *position_axes)
    return ordered.reshape(
        samples,
        problem.groups,
        problem.in_per_group * geometry.kernel_positions,
        problem.rows_per_sample * problem.positions,
    )
