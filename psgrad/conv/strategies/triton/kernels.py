"""Triton kernels: the weight gradient as an implicit matrix product, with the sample in the grid.

For sample n, group q and kernel offset d,
`dW[n, q, o, i, d] = sum_{k,t} g[(n k), (q o), t] x[(n k), (q i), s t + dil d - p]`.
A program owns one tile `[O, I]` of one offset and walks over rows k and positions t; the shifted x is
read in place, masked outside of the input. No unfolded copy exists. Sums are float32.

Every spatial problem is 3-D here: missing axes have length 1. All strides are arguments, so any memory
layout runs. Offsets are 64-bit.

The grid has one axis, its tiles fastest: programs that run at the same time read the same sample, from
cache, and their number is limited by 2^31 alone. T_BUCKET and CHANNELS_LAST are read by nothing: for each
of their values the tile is tuned anew.
"""

import triton
import triton.language as tl

from psgrad.conv.strategies.triton.tiles import CHANNELWISE, PRODUCT, tuned

__all__ = ["channelwise_kernel", "weight_grad_kernel"]

TUNED_FOR = ("T_BUCKET", "CHANNELS_LAST", "STORE", "SQUARE")


@triton.jit
def _position(t, OUT_H, OUT_W):
    """Split a flat output position into its three axes."""
    return t // (OUT_H * OUT_W), (t // OUT_W) % OUT_H, t % OUT_W


@triton.jit
def _input_position(t, offset, OUT_H, OUT_W, KERNEL_H, KERNEL_W, SD, SH, SW, DD, DH, DW, PD, PH, PW):
    """Where each output position t reads x for one kernel offset: `s t + dil d - p` on three axes."""
    td, th, tw = _position(t, OUT_H, OUT_W)
    kd, kh, kw = _position(offset, KERNEL_H, KERNEL_W)
    return td * SD + kd * DD - PD, th * SH + kh * DH - PH, tw * SW + kw * DW - PW


@tuned(PRODUCT, key=("OUT_C", "IN_C", "OFFSETS", *TUNED_FOR, "PRECISION"))
@triton.jit
def weight_grad_kernel(
    x_ptr, g_ptr, out_ptr, partial_ptr,
    ROWS, T, OUT_H, OUT_W, IN_D, IN_H, IN_W,
    x_row, x_channel, x_d, x_h, x_w,
    g_row, g_channel, g_d, g_h, g_w,
    GROUPS: tl.constexpr, OUT_C: tl.constexpr, IN_C: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, OFFSETS: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    T_BUCKET: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STORE: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip  # one a line is a page
    """One tile `[O, I]` of one (sample, group, offset) a program.

    STORE writes the tile to `out [N, G, O, I, offsets]`, SQUARE its sum of squares to `partial [N,
    tiles]`; both may be on. UPCAST multiplies in float32 what Triton's interpreter cannot in bfloat16.
    """
    tiles_i: tl.constexpr = (IN_C + BLOCK_I - 1) // BLOCK_I
    tiles_o: tl.constexpr = (OUT_C + BLOCK_O - 1) // BLOCK_O
    tiles: tl.constexpr = tiles_o * tiles_i * OFFSETS
    tile = tl.program_id(0) % tiles
    sample_group = (tl.program_id(0) // tiles).to(tl.int64)
    n = sample_group // GROUPS
    group = sample_group % GROUPS
    offset = tile % OFFSETS
    tile_oi = tile // OFFSETS
    o = (tile_oi // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tile_oi % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    g_base = g_ptr + (group * OUT_C + o).to(tl.int64)[:, None] * g_channel
    x_base = x_ptr + (group * IN_C + i).to(tl.int64)[None, :] * x_channel

    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for k in range(ROWS):
        row = n * ROWS + k
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            td, th, tw = _position(t, OUT_H, OUT_W)
            ud, uh, uw = _input_position(
                t, offset, OUT_H, OUT_W, KERNEL_H, KERNEL_W, SD, SH, SW, DD, DH, DW, PD, PH, PW
            )
            inside = (t < T) & (ud >= 0) & (ud < IN_D) & (uh >= 0) & (uh < IN_H) & (uw >= 0) & (uw < IN_W)
            g_at = row * g_row + td.to(tl.int64) * g_d + th.to(tl.int64) * g_h + tw.to(tl.int64) * g_w
            x_at = row * x_row + ud.to(tl.int64) * x_d + uh.to(tl.int64) * x_h + uw.to(tl.int64) * x_w
            g = tl.load(g_base + g_at[None, :], mask=(o < OUT_C)[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_base + x_at[:, None], mask=inside[:, None] & (i < IN_C)[None, :], other=0.0)
            if UPCAST:
                g, x = g.to(tl.float32), x.to(tl.float32)
            acc = tl.dot(g, x, acc, input_precision=PRECISION)

    if STORE:
        at = ((sample_group * OUT_C + o)[:, None] * IN_C + i[None, :]) * OFFSETS + offset
        tl.store(
            out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(o < OUT_C)[:, None] & (i < IN_C)[None, :]
        )
    if SQUARE:
        total = tl.sum(tl.sum(acc * acc, axis=1), axis=0)
        tl.store(partial_ptr + sample_group * tiles + tile, total)


@tuned(CHANNELWISE, key=("CHANNELS", "OFFSETS", *TUNED_FOR))
@triton.jit
def channelwise_kernel(
    x_ptr, g_ptr, out_ptr, partial_ptr,
    ROWS, T, OUT_H, OUT_W, IN_D, IN_H, IN_W,
    x_row, x_channel, x_d, x_h, x_w,
    g_row, g_channel, g_d, g_h, g_w,
    CHANNELS: tl.constexpr, OUT_C: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, OFFSETS: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    T_BUCKET: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STORE: tl.constexpr, SQUARE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip  # one a line is a page
    """One input channel a group (depthwise): plain multiply-adds, bounded by memory.

    A program owns a block of output channels and a kernel offset of one sample. Output channel c reads
    input channel `c // O`. Results as in `weight_grad_kernel`.
    """
    tiles: tl.constexpr = ((CHANNELS + BLOCK_C - 1) // BLOCK_C) * OFFSETS
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    offset = tile % OFFSETS
    c = (tile // OFFSETS) * BLOCK_C + tl.arange(0, BLOCK_C)
    g_base = g_ptr + c.to(tl.int64)[:, None] * g_channel
    x_base = x_ptr + (c // OUT_C).to(tl.int64)[:, None] * x_channel

    acc = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for k in range(ROWS):
        row = n * ROWS + k
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            td, th, tw = _position(t, OUT_H, OUT_W)
            ud, uh, uw = _input_position(
                t, offset, OUT_H, OUT_W, KERNEL_H, KERNEL_W, SD, SH, SW, DD, DH, DW, PD, PH, PW
            )
            inside = (t < T) & (ud >= 0) & (ud < IN_D) & (uh >= 0) & (uh < IN_H) & (uw >= 0) & (uw < IN_W)
            g_at = row * g_row + td.to(tl.int64) * g_d + th.to(tl.int64) * g_h + tw.to(tl.int64) * g_w
            x_at = row * x_row + ud.to(tl.int64) * x_d + uh.to(tl.int64) * x_h + uw.to(tl.int64) * x_w
            mask = (c < CHANNELS)[:, None] & inside[None, :]
            g = tl.load(g_base + g_at[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_base + x_at[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(g * x, axis=1)

    if STORE:
        at = (n * CHANNELS + c) * OFFSETS + offset
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=c < CHANNELS)
    if SQUARE:
        tl.store(partial_ptr + n * tiles + tile, tl.sum(acc * acc, axis=0))
