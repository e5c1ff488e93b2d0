"""The ordinary weight gradient, summed over the batch: one `convolution_backward`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from psgrad.conv.patches import patches
from psgrad.conv.problem import WeightGradProblem

__all__ = ["ordinary_weight_grad"]


def ordinary_weight_grad(
    x: Tensor, grad: Tensor, problem: WeightGradProblem, groups_factor: int = 1
) -> Tensor:
    """Weight gradient summed over all rows: `N(GO), N(GI) -> (GO)I k`.

    `groups_factor` multiplies both the groups and the first axis of the result, for rules that fold
    an axis into the channels.
    """
    geometry = problem.geometry
    if problem.positions == 1 and groups_factor == 1:
        # N G O, N G (Ik) -> G O (Ik): a convolution with one output position is a matrix product a group
        rows = x.shape[0]
        window = patches(x, replace(problem, samples=rows, rows_per_sample=1), rows).squeeze(3)
        grad = grad.reshape(rows, problem.groups, problem.out_per_group)
        return (grad.permute(1, 2, 0) @ window.transpose(0, 1)).reshape(problem.weight_shape)
    out_channels, *rest = problem.weight_shape
    dummy = x.new_empty(()).expand(out_channels * groups_factor, *rest)
    weight_grad = torch.ops.aten.convolution_backward(
        grad,
        x,
        dummy,
        None,
        geometry.stride,
        geometry.symmetric_padding,
        geometry.dilation,
        False,
        (0,) * len(geometry.stride),
        geometry.groups * groups_factor,
        (False, True, False),
    )[1]
    # oneDNN's bfloat16 kernels leave uninitialised memory where an offset meets padding alone.
    for axis, offset in problem.padding_only_offsets:
        weight_grad.select(axis, offset).zero_()
    return weight_grad
