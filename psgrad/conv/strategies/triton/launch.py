"""Launching the kernels: padding to three axes, the grid, and the buffers of each epilogue."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.triton.kernels import channelwise_kernel, weight_grad_kernel
from psgrad.conv.strategies.triton.tiles import suiting

__all__ = ["kernel_and_constants", "launch", "tensors_and_numbers"]


def launch(
    x: Tensor,
    grad: Tensor,
    problem: WeightGradProblem,
    *,
    store: bool,
    square: bool,
    precision: str,
    tile: triton.Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Run one kernel over the whole batch.

    Parameters
    ----------
    x, grad
        As `normalise` returns them, float32, bfloat16 or float16, any strides.
    problem
        Theirs, with at least one sample.
    store
        Whether to write the gradients.
    square
        Whether to sum their squares, from the float32 sums before any rounding.
    precision
        Of float32 products: "ieee" or "tf32".
    tile
        One of `tiles.PRODUCT`, or of `tiles.CHANNELWISE` where a group has one input channel. None: on CUDA
        the fastest, timed the first time a machine meets such a problem; interpreted, the largest that suits.

    Returns
    -------
    tuple[Tensor | None, Tensor | None]
        Gradients `[N, *weight_shape]` in the dtype of x, and squared norms `[N]` in float32; each None
        where it was not asked for. The squares are added in a fixed order: the same every time one tile is
        taken.

    """
    p = problem
    kernel, constants = kernel_and_constants(x, p, store=store, square=square, precision=precision)
    tiles = suiting(kernel.configs, constants) if tile is None else [tile]
    out = x.new_empty(p.samples, *p.weight_shape) if store else None
    most = max(_programs(p, one.kwargs) for one in tiles) if square else 0
    partial = torch.empty(most, dtype=torch.float32, device=x.device)
    launched: list[int] = []  # by the last of possibly many: the one whose results stay

    def grid(meta: dict[str, Any]) -> tuple[int]:
        launched[:] = [_programs(p, meta)]
        return (launched[0],)

    with torch.cuda.device_of(x):
        (kernel if tile is None else kernel.fn)[grid](
            *tensors_and_numbers(x, grad, out, partial, p),
            **constants,
            **({} if tile is None else tile.all_kwargs()),
        )
    return out, partial[: launched[0]].reshape(p.samples, -1).sum(1) if square else None


def kernel_and_constants(
    x: Tensor, problem: WeightGradProblem, *, store: bool, square: bool, precision: str
) -> tuple[Any, dict[str, Any]]:
    """Return the kernel that serves a problem, and what it is compiled for, its tile apart."""
    p = problem
    geometry = p.geometry
    assert geometry.kernel_size is not None
    kernel = _three(geometry.kernel_size, 1)
    common = {
        "KERNEL_H": kernel[1],
        "KERNEL_W": kernel[2],
        "OFFSETS": geometry.kernel_positions,
        **dict(zip(("SD", "SH", "SW"), _three(geometry.stride, 1), strict=True)),
        **dict(zip(("DD", "DH", "DW"), _three(geometry.dilation, 1), strict=True)),
        **dict(zip(("PD", "PH", "PW"), _three(geometry.symmetric_padding, 0), strict=True)),
        "T_BUCKET": 1 << max(0, p.positions - 1).bit_length(),
        "CHANNELS_LAST": x.stride(1) == 1,
        "STORE": store,
        "SQUARE": square,
    }
    if p.in_per_group == 1:
        return channelwise_kernel, {
            "CHANNELS": p.groups * p.out_per_group,
            "OUT_C": p.out_per_group,
            **common,
        }
    widened = x.device.type == "cpu"  # Triton's interpreter multiplies no bfloat16
    groups = {"GROUPS": p.groups, "OUT_C": p.out_per_group, "IN_C": p.in_per_group}
    return weight_grad_kernel, {**groups, "PRECISION": precision, "UPCAST": widened, **common}


def tensors_and_numbers(
    x: Tensor, grad: Tensor, out: Tensor | None, partial: Tensor, problem: WeightGradProblem
) -> tuple[Any, ...]:
    """Return the arguments that both kernels take first: four tensors, then sizes and strides."""
    p = problem
    out_size, in_size = _three(p.output_size, 1), _three(p.input_size, 1)
    sizes = (p.rows_per_sample, p.positions, *out_size[1:], *in_size)
    return x, grad, x if out is None else out, partial, *sizes, *_strides(x), *_strides(grad)


def _programs(problem: WeightGradProblem, tile: dict[str, Any]) -> int:
    p = problem
    if "BLOCK_C" in tile:
        blocks = -(-p.groups * p.out_per_group // tile["BLOCK_C"])
    else:
        blocks = p.groups * -(-p.out_per_group // tile["BLOCK_O"]) * -(-p.in_per_group // tile["BLOCK_I"])
    return p.samples * blocks * p.geometry.kernel_positions


def _three(sizes: tuple[int, ...], missing: int) -> tuple[int, int, int]:
    depth, height, width = (missing,) * (3 - len(sizes)) + tuple(sizes)
    return depth, height, width


def _strides(t: Tensor) -> tuple[int, ...]:
    row, channel, *spatial = t.stride()
    return (row, channel, *_three(tuple(spatial), 0))
