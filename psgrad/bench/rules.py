"""The batch rules under `torch.vmap` against PyTorch's own, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from psgrad.bench.sweep import Result
from psgrad.bench.timing import Run, interleave, on_cpu, on_cuda
from psgrad.conv import ConvGeometry, use_rules

__all__ = ["LEAST_SPEED", "RULE_CASES", "RuleCase", "measure_rule_case", "slower_than_asked"]

OURS = "psgrad"
LEAST_SPEED = 0.95
"""Of PyTorch's own rules, which no case is to be slower than."""


@dataclass(frozen=True)
class RuleCase:
    """One operator under one `vmap`: which operands have the vmapped axis, and their shapes.

    Attributes
    ----------
    operator
        "forward", or "backward" for the gradients of input and weight, without that of an operand that
        nothing batched enters.
    batched
        Letters of the operands with the vmapped axis: x, w (weight), b (bias), g (gradient of the output).
    layer
        Name of the layer.
    channels, size, kernel_size
        Of the layer: as many outputs as inputs, the same length on every spatial axis.
    groups, transposed
        Of the layer.
    batch, samples
        B and N.

    """

    operator: str
    batched: str
    layer: str
    channels: int
    size: tuple[int, ...]
    kernel_size: int = 3
    groups: int = 1
    transposed: bool = False
    batch: int = 8
    samples: int = 4

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.operator} {self.batched} {self.layer} B={self.batch}"

    def call(self) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """Return the vmapped operator and its operands, standard normal."""
        generator = torch.Generator().manual_seed(0)
        kernel = (self.kernel_size,) * len(self.size)
        geometry = ConvGeometry(kernel, 1, self.kernel_size // 2, 1, self.transposed, groups=self.groups).at(
            kernel
        )
        image = (self.samples, self.channels, *self.size)
        shapes = {
            "x": image,
            "w": (self.channels, self.channels // self.groups, *kernel),
            "b": (self.channels,),
            "g": image,
        }
        used = "xwb" if "b" in self.batched else "xw" if self.operator == "forward" else "gxw"
        operands = tuple(
            torch.randn(*(self.batch,) * (letter in self.batched), *shapes[letter], generator=generator)
            for letter in used
        )
        in_dims = tuple(0 if letter in self.batched else None for letter in used)
        numbers = (
            geometry.stride,
            geometry.symmetric_padding,
            geometry.dilation,
            self.transposed,
            geometry.output_padding,
            self.groups,
        )
        mask = (self.batched != "x", self.batched != "w", False)

        def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return torch.convolution(x, weight, bias, *numbers)

        def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *numbers, mask)
            return tuple(grad for grad in grads if grad is not None)

        function = forward if self.operator == "forward" else backward
        return torch.vmap(function, in_dims=in_dims), operands


_LAYERS: tuple[dict[str, Any], ...] = (
    {"layer": "64-64 3x3 @32", "channels": 64, "size": (32, 32)},
    {"layer": "64-64 3x3 @32 groups 4", "channels": 64, "size": (32, 32), "groups": 4},
    {"layer": "transposed 64-64 3x3 @32", "channels": 64, "size": (32, 32), "transposed": True},
    {
        "layer": "transposed 64-64 3x3 @32 groups 4",
        "channels": 64,
        "size": (32, 32),
        "transposed": True,
        "groups": 4,
    },
    {"layer": "64-64 5 @1024", "channels": 64, "size": (1024,), "kernel_size": 5},
)
_SMALL: dict[str, Any] = {"layer": "16-16 3x3 @8", "channels": 16, "size": (8, 8)}
_PER_SAMPLE: tuple[dict[str, Any], ...] = (
    {"layer": "64-64 3x3 @32", "channels": 64, "size": (32, 32)},
    {"layer": "256-256 3x3 @8", "channels": 256, "size": (8, 8)},
    {"layer": "depthwise 64 3x3 @32", "channels": 64, "size": (32, 32), "groups": 64},
    {"layer": "64-64 5 @1024", "channels": 64, "size": (1024,), "kernel_size": 5},
)

RULE_CASES: tuple[RuleCase, ...] = (
    *(RuleCase("forward", batched, **layer) for layer, batched in product(_LAYERS, ("x", "w", "xw", "xwb"))),
    *(
        RuleCase("backward", batched, **layer)
        for layer, batched in product(_LAYERS, ("g", "x", "w", "gx", "gw", "xw", "gxw"))
    ),
    *(RuleCase("forward", batched, **_SMALL) for batched in ("x", "w", "xw")),
    *(RuleCase("backward", batched, **_SMALL) for batched in ("gx", "gw", "gxw")),
    *(RuleCase("backward", "gx", **layer, batch=32, samples=1) for layer in _PER_SAMPLE),
)
"""Every combination of batched operands on five layers of a network's size; a small layer, which shows
what a call costs; and the per-sample path (N = 1) on four."""


class _UnderRules:
    """A call to be made, and timed, inside `use_rules(strategy)`."""

    def __init__(self, strategy: str, run: Run) -> None:
        self.strategy = strategy
        self.run = run

    def __call__(self) -> object:
        return self.run()


def slower_than_asked(results: Iterable[Result]) -> list[Result]:
    """Those of psgrad's own choice that are below `LEAST_SPEED`."""
    return [
        result
        for result in results
        if result.contender == OURS and result.measurement and result.measurement.ratio > 1 / LEAST_SPEED
    ]


def measure_rule_case(
    case: RuleCase, *, rounds: int, device: str = "cpu", stop: Callable[[], bool] = lambda: False
) -> list[Result]:
    """Compare with PyTorch's own rules first, then time in turn; the floor is PyTorch's own.

    "psgrad" is `use_rules()`; the per-sample path is timed by each strategy that never refuses it, too.
    Entering the context is not timed. When `stop` says yes before a round was finished, nothing is returned.
    """
    function, operands = case.call()
    operands = tuple(t.to(device) for t in operands)
    own: Run = partial(function, *operands)
    names = {OURS: "auto"}
    if case.samples == 1:
        names |= {strategy: strategy for strategy in ("loop", "grouped", "unfold")}
    expected = _tensors(own())
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name, strategy in names.items():
        with use_rules(strategy):
            pairs = zip(_tensors(own()), expected, strict=True)
            errors[name] = max(float((a - e).norm() / e.norm()) for a, e in pairs)
        if errors[name] < 1e-4:
            runs[name] = _UnderRules(strategy, own)
    watch = on_cuda if device == "cuda" else on_cpu

    def stopwatch(run: Run, repeats: int) -> float:
        with use_rules(run.strategy) if isinstance(run, _UnderRules) else nullcontext():
            run()  # not timed: the first call after registering looks its kernel up
            return watch(run, repeats)

    measured = interleave(runs, own, rounds=rounds, stopwatch=stopwatch, stop=stop)
    if runs and not measured:
        return []
    return [
        Result(
            case.name,
            case.samples,
            name,
            errors[name],
            None if name in runs else f"differs by {errors[name]:.1e}",
            measured.get(name),
        )
        for name in names
    ]


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
