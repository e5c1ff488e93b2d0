"""Launching the kernels: padding to three axes, tiles, and the buffers of each epilogue."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.strategies.triton.kernels import channelwise_kernel, weight_grad_kernel

__all__ = ["launch"]


def launch(
    x: Tensor, grad: Tensor, problem: WeightGradProblem, *, store: bool, square: bool, precision: str
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

    Returns
    -------
    tuple[Tensor | None, Tensor | None]
        Gradients `[N, *weight_shape]` in the dtype of x, and squared norms `[N]` in float32; each None
        where it was not asked for. The squares are added in a fixed order: the same every time.

    """
    p = problem
    geometry = p.geometry
    assert geometry.kernel_size is not None
    offsets = geometry.kernel_positions
    kernel = _three(geometry.kernel_size, 1)
    out_size, in_size = _three(p.output_size, 1), _three(p.input_size, 1)
    out = x.new_empty(p.samples, *p.weight_shape) if store else None
    numbers = (p.rows_per_sample, p.positions, *out_size[1:], *in_size, *_strides(x), *_strides(grad))
    common = {
        "KERNEL_H": kernel[1],
        "KERNEL_W": kernel[2],
        "OFFSETS": offsets,
        **dict(zip(("SD", "SH", "SW"), _three(geometry.stride, 1), strict=True)),
        **dict(zip(("DD", "DH", "DW"), _three(geometry.dilation, 1), strict=True)),
        **dict(zip(("PD", "PH", "PW"), _three(geometry.symmetric_padding, 0), strict=True)),
        "STORE": store,
        "SQUARE": square,
    }
    if p.in_per_group == 1:
        channels = p.groups * p.out_per_group
        block_c, block_t = min(16, _power_of_two(channels)), min(256, _power_of_two(p.positions))
        programs = (p.samples, -(-channels // block_c) * offsets)
        partial = _partials(x, programs, square)
        channelwise_kernel[programs](
            x, grad, _or(out, x), _or(partial, x), *numbers,
            CHANNELS=channels, OUT_C=p.out_per_group, BLOCK_C=block_c, BLOCK_T=block_t, **common,
        )  # fmt: skip
    else:
        block_o, block_i = (min(64, max(16, _power_of_two(c))) for c in (p.out_per_group, p.in_per_group))
        block_t = min(64, max(16, _power_of_two(p.positions)))
        tiles = -(-p.out_per_group // block_o) * -(-p.in_per_group // block_i) * offsets
        programs = (p.samples * p.groups, tiles)
        partial = _partials(x, programs, square)
        weight_grad_kernel[programs](
            x, grad, _or(out, x), _or(partial, x), *numbers,
            GROUPS=p.groups, OUT_C=p.out_per_group, IN_C=p.in_per_group, PRECISION=precision,
            UPCAST=x.device.type == "cpu",
            BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_T=block_t, **common,
        )  # fmt: skip
    norms = None if partial is None else partial.reshape(p.samples, -1).sum(1)
    return out, norms


def _partials(x: Tensor, programs: tuple[int, int], square: bool) -> Tensor | None:
    return torch.empty(prod(programs), dtype=torch.float32, device=x.device) if square else None


def _or(buffer: Tensor | None, unused: Tensor) -> Tensor:
    """Stand in for a buffer that the kernel does not touch."""
    return unused if buffer is None else buffer


def _three(sizes: tuple[int, ...], missing: int) -> tuple[int, int, int]:
    depth, height, width = (missing,) * (3 - len(sizes)) + tuple(sizes)
    return depth, height, width


def _strides(t: Tensor) -> tuple[int, ...]:
    row, channel, *spatial = t.stride()
    return (row, channel, *_three(tuple(spatial), 0))


def _power_of_two(length: int) -> int:
    return 1 << max(0, length - 1).bit_length()
