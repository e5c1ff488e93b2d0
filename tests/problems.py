"""The generator of convolution problems: shapes, arguments and memory layouts that Hypothesis draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from psgrad.conv import ConvGeometry
from psgrad.conv.live import live_kernel
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES
from tests import oracle

__all__ = ["LAYOUTS", "ConvProblem", "conv_arguments", "conv_problems", "lay_out", "serves"]

LAYOUTS = (
    "contiguous",
    "channels_last",
    "transposed",
    "expanded_rows",
    "expanded_channels",
    "sliced",
)


@dataclass(frozen=True)
class ConvProblem:
    """Two operands and the arguments of their convolution, as `torch.nn.functional` takes them.

    Shapes: x `[(N K), C_in, *spatial]`, grad_output `[(N K), C_out, *spatial]`.
    """

    x: Tensor = field(repr=False)
    grad_output: Tensor = field(repr=False)
    weight_shape: tuple[int, ...]
    rows_per_sample: int
    conv: dict[str, Any]
    layouts: tuple[str, str]
    x_shape: tuple[int, ...]

    @property
    def samples(self) -> int:
        """N."""
        return self.x.shape[0] // self.rows_per_sample

    @property
    def geometry(self) -> ConvGeometry:
        """The same arguments, as psgrad takes them."""
        return ConvGeometry(self.weight_shape[2:], **self.conv)

    @property
    def operands(self) -> tuple[Tensor, Tensor, tuple[int, ...], ConvGeometry]:
        """The positional arguments that the three verbs share."""
        return self.x, self.grad_output, self.weight_shape, self.geometry

    def oracle(self) -> Tensor:
        """Per-sample gradients in float64 `[N, *weight_shape]`."""
        return oracle.weight_grads(
            self.x, self.grad_output, self.weight_shape, rows_per_sample=self.rows_per_sample, **self.conv
        )

    def oracle_of_magnitudes(self) -> Tensor:
        """The same sums over absolute values: what rounding errors are proportional to."""
        return oracle.weight_grads(
            self.x.abs(),
            self.grad_output.abs(),
            self.weight_shape,
            rows_per_sample=self.rows_per_sample,
            **self.conv,
        )


def serves(strategy: str, verb: str, operands: tuple, rows_per_sample: int = 1) -> bool:
    """Whether a strategy, or "auto", takes the verbs' positional arguments."""
    if strategy == "auto":
        return True
    problem = normalise(*operands, rows_per_sample)[2]
    live = live_kernel(problem)
    problem = problem if live is None else live.problem
    return STRATEGIES[strategy].refusal(problem, verb) is None


def lay_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of the shape of `t` in this memory layout; the expanded ones repeat the first entry."""
    match layout:
        case "contiguous":
            return t.contiguous()
        case "channels_last":
            # NCS -> NSC in memory; a format with a name for two and three spatial axes
            return t.movedim(1, -1).contiguous().movedim(-1, 1)
        case "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        case "expanded_rows":
            return t[:1].expand_as(t)
        case "expanded_channels":
            return t[:, :1].expand_as(t)
        case "sliced":
            larger = t.new_full([s + 2 for s in t.shape], float("nan"))
            window = larger[tuple(slice(1, 1 + s) for s in t.shape)]
            return window.copy_(t)
    raise ValueError(layout)


def _axes(draw: st.DrawFn, rank: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(least, most)) for _ in range(rank))


def _as_given(draw: st.DrawFn, values: tuple[int, ...]) -> Any:
    """A tuple, or the int that stands for it where all axes agree."""
    return values[0] if len(set(values)) == 1 and draw(st.booleans()) else values


@st.composite
def conv_arguments(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Input `[C_in, *spatial]`, weight shape and convolution arguments whose output is not empty."""
    rank = draw(st.sampled_from((1, 2, 2, 3)))
    transposed = draw(st.booleans())
    kernel = _axes(draw, rank, 1, 5 - rank if rank > 1 else 5)
    kinds = ("int", "ints", "pairs") + (() if transposed else ("same", "valid"))
    kind = draw(st.sampled_from(kinds))
    stride = (1,) * rank if kind == "same" else _axes(draw, rank, 1, 3)
    dilation = _axes(draw, rank, 1, 3 if rank < 3 else 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]

    padding: Any = kind
    ends = [(0, 0)] * rank
    if kind == "int":
        padding = draw(st.integers(0, 2))
        ends = [(padding, padding)] * rank
    elif kind == "ints":
        padding = _axes(draw, rank, 0, 3)
        ends = [(p, p) for p in padding]
    elif kind == "pairs":
        padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
        ends = list(padding)
    elif kind == "same":
        ends = [((r - 1) // 2, r - 1 - (r - 1) // 2) for r in reach]

    more = _axes(draw, rank, 0, 4 if rank < 3 else 2)
    conv: dict[str, Any] = {"padding": padding, "transposed": transposed}
    if transposed:
        # torch allows an output_padding of a stride or more as long as the dilation is larger
        output_padding = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        conv["output_padding"] = _as_given(draw, output_padding)
        # (L - 1) s - p + reach + output_padding >= 1
        least = [
            1 + max(0, -(-(sum(p) + 1 - r - o) // s))
            for p, r, o, s in zip(ends, reach, output_padding, stride, strict=True)
        ]
    else:
        least = [max(1, r - sum(p)) for r, p in zip(reach, ends, strict=True)]
    spatial = tuple(a + b for a, b in zip(least, more, strict=True))

    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans()) and groups > 1
    in_per_group = 1 if depthwise else draw(st.integers(1, 3))
    out_per_group = draw(st.integers(1, 2 if depthwise else 3))
    first, second = (in_per_group, out_per_group) if transposed else (out_per_group, in_per_group)
    conv |= {
        "stride": _as_given(draw, stride),
        "dilation": _as_given(draw, dilation),
        "groups": groups,
    }
    return (groups * in_per_group, *spatial), (groups * first, second, *kernel), conv


@st.composite
def conv_problems(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, min_samples: int = 0, layouts: tuple = LAYOUTS
) -> ConvProblem:
    """A problem with standard normal operands of `dtype`, N up to 4 and K up to 3."""
    x_shape, weight_shape, conv = draw(conv_arguments())
    samples, rows_per_sample = draw(st.integers(min_samples, 4)), draw(st.integers(1, 3))
    rows = samples * rows_per_sample
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout_of_x, layout_of_grad = draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))
    x = torch.randn(rows, *x_shape, generator=generator, dtype=torch.float64).to(dtype)
    # of one row, since torch does not run every empty batch
    one = torch.zeros(1, *x_shape, dtype=torch.float64)
    output = oracle.convolve(one, torch.zeros(weight_shape, dtype=torch.float64), **conv).shape[1:]
    grad_output = torch.randn(rows, *output, generator=generator, dtype=torch.float64).to(dtype)
    return ConvProblem(
        x=lay_out(x, layout_of_x),
        grad_output=lay_out(grad_output, layout_of_grad),
        weight_shape=weight_shape,
        rows_per_sample=rows_per_sample,
        conv=conv,
        layouts=(layout_of_x, layout_of_grad),
        x_shape=tuple(x.shape),
    )
