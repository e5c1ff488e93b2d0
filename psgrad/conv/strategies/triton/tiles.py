"""Which tiles a kernel may have, and which of them are worth timing for a problem.

The lists are short, as every tile is compiled and timed once for each kind of problem; Triton keeps the
result on disk. Each compiles for compute capability 8.0 and 9.0 in every precision, within the shared memory
there, and spills next to no registers; but `64 x 64 x 64` in exact float32 on 8.0, up to 688 bytes a thread
(`tests/conv/test_triton_compiles.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import triton
from triton.testing import do_bench

__all__ = ["CHANNELWISE", "PRODUCT", "suiting", "tuned"]

PRODUCT = tuple(
    triton.Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_T": t}, num_warps=warps, num_stages=stages)
    for o, i, t, warps, stages in (
        (16, 16, 64, 2, 3),
        (32, 32, 64, 4, 3),
        (64, 16, 64, 4, 3),
        (64, 32, 64, 4, 3),
        (64, 64, 32, 4, 3),
        (64, 64, 64, 4, 3),
        (128, 64, 32, 4, 3),
        (128, 128, 32, 8, 3),
    )
)
"""Tiles `[O, I]` of a matrix product, which walks over the positions BLOCK_T at a time."""

CHANNELWISE = tuple(
    triton.Config({"BLOCK_C": channels, "BLOCK_T": t}, num_warps=4, num_stages=2)
    for channels, t in ((4, 256), (16, 128), (64, 32))
)
"""Channels and positions of a program that reads one input channel a group."""


def tuned(tiles: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorate a kernel: on CUDA the fastest of the `suiting` tiles, found once for each value of the key.

    Interpreted, nothing is timed: the largest is taken.
    """

    def worth_timing(
        tiles: list[triton.Config], arguments: dict[str, Any], **constants: Any
    ) -> list[triton.Config]:
        return suiting(tiles, constants)[0 if arguments["x_ptr"].device.type == "cuda" else -1 :]

    return triton.autotune(
        configs=list(tiles),
        key=list(key),
        prune_configs_by={"early_config_prune": worth_timing},
        do_bench=_milliseconds,
        cache_results=True,
    )


def suiting(tiles: Sequence[triton.Config], constants: dict[str, Any]) -> list[triton.Config]:
    """Return the tiles that suit a problem's channels, cut to its positions.

    A tile suits if it reaches on no axis to twice the channels, and is no less than an eighth of the
    largest that suits.

    Parameters
    ----------
    tiles
        `PRODUCT` or `CHANNELWISE`, the smallest first.
    constants
        The kernel's: `T_BUCKET`, and `OUT_C` and `IN_C`, or `CHANNELS`.

    Returns
    -------
    list[triton.Config]
        At least one, the smallest first.

    """
    channels = {"BLOCK_O": "OUT_C", "BLOCK_I": "IN_C", "BLOCK_C": "CHANNELS"}

    def blocks(tile: triton.Config) -> dict[str, int]:
        return {channels[name]: block for name, block in tile.kwargs.items() if name in channels}

    least = blocks(tiles[0])
    fitting = [
        tile
        for tile in tiles
        if all(block <= least[axis] or block < 2 * constants[axis] for axis, block in blocks(tile).items())
    ]
    largest = max(prod(blocks(tile).values()) for tile in fitting)
    near = [_cut(tile, constants) for tile in fitting if 8 * prod(blocks(tile).values()) >= largest]
    return list({str(tile): tile for tile in near}.values())


def _cut(tile: triton.Config, constants: dict[str, Any]) -> triton.Config:
    """Make no tile walk further than the positions; a matrix product takes 16 at least."""
    block_t = min(tile.kwargs["BLOCK_T"], max(16, constants["T_BUCKET"]))
    return triton.Config(
        {**tile.kwargs, "BLOCK_T": block_t}, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


def _milliseconds(call: Callable[[], object], quantiles: Sequence[float]) -> Any:
    """Quantiles over many runs with a cold cache; interpreted, of one run."""
    if torch.cuda.is_available():
        return do_bench(call, warmup=5, rep=30, quantiles=list(quantiles))
    start = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - start)] * len(quantiles)
