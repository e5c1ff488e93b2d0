"""`correlate`: the forward convolution of x with its output's gradient as the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from psgrad.conv.chunking import chunks, samples_per_chunk
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.processor import short_vectors
from psgrad.conv.products import mkl_slowdown
from psgrad.conv.strategies.base import Cost, Strategy, Verb

__all__ = ["Correlate"]


class Correlate(Strategy):
    """`I(NGK), (NGO)K -> I(NGO)k -> N(GO)I k`: stride and dilation change places, groups N*G.

    A weight gradient correlates x with grad, and that is what a convolution computes: with x's channels
    as its batch, grad as its kernel and the weight as its output. Depthwise layers have the forward
    kernels of a backend that their backward lacks; with samples as groups, so have layers of one input
    channel, and by the sample dense 3-D layers where vectors are short.
    """

    name = "correlate"

    def refusal(self, problem: WeightGradProblem, verb: Verb) -> str | None:
        """Refuse all but depthwise layers, and others where a backend's backward is slow."""
        if problem.samples == 0:
            return "an empty batch has no groups"
        if _is_depthwise(problem) or _is_of_one_channel(problem):
            return None
        return _why_not_dense(problem)

    def cost(self, problem: WeightGradProblem, verb: Verb) -> Cost:
        """F FLOPs in a call a chunk; of dense layers with several channels a sample."""
        chunk = self._chunk(problem)
        operands = problem.operand_bytes * (1.0 if problem.groups > 1 or problem.in_per_group > 1 else 0.5)
        return Cost(
            flops=problem.flops,
            bytes=problem.samples * (operands + 2 * problem.gradient_bytes),
            calls=(5 if _is_depthwise(problem) else 3) * -(-problem.samples // chunk),
            peak_bytes=min(chunk, problem.samples) * (problem.operand_bytes + problem.gradient_bytes),
            slowdown=_slowdown(problem),
            fast_in_half=True,
        )

    def grads(self, x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
        """See `Strategy.grads`."""
        chunk = self._chunk(problem)
        if chunk >= problem.samples:
            return _in_one_call(x, grad, problem).contiguous()
        out = x.new_empty(problem.samples, *problem.weight_shape)
        for part, rows, here in chunks(problem, chunk):
            out[here] = _in_one_call(x[rows], grad[rows], part)
        return out

    @staticmethod
    def _chunk(problem: WeightGradProblem) -> int:
        if problem.in_per_group > 1:
            return 1
        return samples_per_chunk(problem, problem.operand_bytes // 2 + problem.gradient_bytes)


def _is_depthwise(problem: WeightGradProblem) -> bool:
    return problem.in_per_group == 1 and problem.groups > 1


def _is_of_one_channel(problem: WeightGradProblem) -> bool:
    """Whether a layer has one input channel, so that samples are the groups of a depthwise convolution.

    On a CPU whose matrix products are slow it took 0.5 to 1.1 of the time of the best other strategy, on
    eleven layers of 8 to 256 samples; of one sample 0.85 to 2.3. Where products are fast it was not measured.
    """
    p = problem
    return p.in_per_group == p.groups == 1 and mkl_slowdown(p.dtype, p.device) > 1


def _slowdown(problem: WeightGradProblem) -> float:
    """How many times slower than a matrix product: fitted to 22 depthwise layers, and 11 of one channel.

    The forward kernels vectorise over the output, here the weight's offsets, if a row of them is long.
    """
    if problem.device.type == "cuda":
        return 30.0  # not measured: the others go first
    offsets, rank = problem.geometry.kernel_positions, len(problem.input_size)
    if problem.in_per_group > 1:  # against what the others are said to take, at rates of longer vectors
        return 0.75 if rank == 2 else 0.6
    if problem.groups == 1:
        return 8.0 if problem.samples == 1 else 1.0 if rank == 1 else 2.0
    if rank == 1:
        return 18.0 * max(1.0, offsets / 16)
    return 8.0 if rank == 2 and offsets >= 16 else 20.0


def _why_not_dense(problem: WeightGradProblem) -> str | None:
    """Why a layer that is not depthwise is left to the others, or None.

    With vectors of 8 floats, forward kernels of one sample run at the rate of a matrix product, where the
    backward of a 3-D layer reaches a third of it: measured on 14 3-D and 9 2-D layers of 1 to 32 samples.
    Few channels, few positions and strides, which dilate the kernel, lose; so do all with longer vectors.
    """
    p, geometry = problem, problem.geometry
    if p.device.type != "cpu" or not short_vectors():
        return "not depthwise: a convolution with grad as its kernel is slower than one with few offsets"
    if p.groups > 1 or p.dtype != torch.float32 or p.rows_per_sample > 1:
        return "not depthwise: with groups, several rows a sample or other dtypes the others are faster"
    if geometry.kernel_positions == 1 or max(*geometry.stride, *geometry.dilation) > 1:
        return "not depthwise: kernels of one element, strides and dilation are faster by the others"
    least_channels, least_positions = {3: (16, 64), 2: (64, 768)}.get(len(p.input_size), (0, 0))
    if (
        not least_channels
        or min(p.in_per_group, p.out_per_group) < least_channels
        or p.positions < least_positions
    ):
        return "not depthwise: 1-D layers, few channels and few positions are faster by the others"
    return None


def _in_one_call(x: Tensor, grad: Tensor, problem: WeightGradProblem) -> Tensor:
    p, geometry = problem, problem.geometry
    n, k, groups = p.samples, p.rows_per_sample, p.groups
    # (NK)(GI)S -> I(NGK)S
    inputs = x.reshape(n, k, groups, p.in_per_group, *p.input_size).permute(
        3, 0, 2, 1, *range(4, 4 + len(p.input_size))
    )
    inputs = inputs.reshape(p.in_per_group, n * groups * k, *p.input_size)
    # (NK)(GO)T -> (NGO)KT
    kernels = grad.reshape(n, k, groups * p.out_per_group, *p.output_size).transpose(1, 2)
    kernels = kernels.reshape(n * groups * p.out_per_group, k, *p.output_size)
    out = torch.convolution(
        inputs,
        kernels,
        None,
        geometry.dilation,
        geometry.symmetric_padding,
        geometry.stride,
        False,
        (0,) * len(geometry.stride),
        n * groups,
    )
    assert geometry.kernel_size is not None
    for axis, size in enumerate(geometry.kernel_size):  # further offsets that x has room for
        out = out.narrow(2 + axis, 0, size)
    # I(NGO)k -> N(GO)I k
    return out.movedim(0, 1).reshape(n, *p.weight_shape)
