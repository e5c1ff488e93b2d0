"""Run by a test, in a process without Triton's interpreter: compile kernels for GPUs that are not there.

`python -m tests.conv.triton_compiled quick|all` prints one line of JSON a compiled kernel. Arguments are
specialised as Triton's launcher does it: 1 is a constant, multiples of 16 are said to be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from psgrad.conv import ConvGeometry
from psgrad.conv.problem import normalise
from psgrad.conv.strategies.triton.launch import kernel_and_constants, tensors_and_numbers
from psgrad.conv.strategies.triton.tiles import suiting

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PRECISIONS = (
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
)
LAYERS = {  # out channels, in channels, groups, kernel, image
    "3x3": (128, 128, 1, 3, 16),
    "first": (64, 3, 1, 7, 32),
    "groups": (128, 128, 32, 3, 14),
    "depthwise": (96, 96, 96, 7, 28),
    "few positions": (512, 512, 1, 3, 4),
}


EPILOGUES = ((True, False), (False, True), (True, True))  # store, square
COMBINATIONS = tuple(product(PRECISIONS, (False, True), EPILOGUES))  # with channels_last or not


def main(which: str) -> None:
    for number, (layer, architecture, tile) in enumerate(cases()):
        of_both = [c for c in COMBINATIONS if c[2] == (True, True)]
        chosen = of_both if which == "all" else [COMBINATIONS[7 * number % len(COMBINATIONS)]]
        for (dtype, precision), channels_last, (store, square) in chosen:
            x, grad, problem = operands(*LAYERS[layer], dtype, channels_last)
            kernel, constants = kernel_and_constants(
                x, problem, store=store, square=square, precision=precision
            )
            if "UPCAST" in constants:
                constants["UPCAST"] = False
            partial = torch.empty(16)
            arguments = tensors_and_numbers(x, grad, x if store else None, partial, problem)
            seen = compiled(kernel.fn, arguments, constants | tile.kwargs, tile, architecture)
            named = {
                "layer": layer,
                "dtype": str(dtype).removeprefix("torch."),
                "precision": precision,
                "store": store,
            }
            print(json.dumps({**named, "square": square, "channels_last": channels_last, **seen}), flush=True)


def cases() -> Iterator[tuple[str, int, triton.Config]]:
    """Every tile that suits a layer, on each architecture."""
    for layer, architecture in product(LAYERS, (80, 90)):
        x, _, problem = operands(*LAYERS[layer], torch.float32, channels_last=False)
        kernel, constants = kernel_and_constants(x, problem, store=True, square=True, precision="ieee")
        for tile in suiting(kernel.configs, constants):
            yield layer, architecture, tile


def operands(
    out_channels: int,
    in_channels: int,
    groups: int,
    kernel: int,
    image: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Any]:
    geometry = ConvGeometry(kernel, padding=kernel // 2, groups=groups)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (
        torch.zeros(2, c, image, image, dtype=dtype).to(memory_format=memory)
        for c in (in_channels, out_channels)
    )
    return normalise(x, grad, (out_channels, in_channels // groups, kernel, kernel), geometry)


def compiled(
    function: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    tile: triton.Config,
    architecture: int,
) -> dict[str, Any]:
    named = dict(zip(function.arg_names, arguments, strict=False))
    ones = {name: 1 for name, value in named.items() if isinstance(value, int) and value == 1}
    constants |= ones
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        value = named.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = POINTER[value.dtype]
        else:
            signature[name] = "i32"
        if name not in constants and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        function,
        signature,
        {(function.arg_names.index(name),): c for name, c in constants.items()},
        attributes,
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = result.asm["ptx"]
    return {
        "architecture": architecture,
        "tile": str(tile),
        "shared": result.metadata.shared,
        **resources(result.asm["cubin"]),
        "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "stores": len(re.findall(r"st\.global", ptx)),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack, where registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {word: re.search(rf"{word}:(\d+)", text) for word in ("REG", "STACK")}
    return {word.lower(): int(match[1]) for word, match in found.items() if match}


if __name__ == "__main__":
    main(sys.argv[1])
