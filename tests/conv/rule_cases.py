"""Every case of the batch rules as a literal table, and a generator of operands for a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from psgrad.conv import ConvGeometry
from tests import oracle
from tests.problems import LAYOUTS, lay_out

__all__ = ["BACKWARD_CASES", "FORWARD_CASES", "RANKS", "Operands", "entries", "operands", "stacked"]

RANKS = (1, 2, 3)

# (batched operands of x, w[eight], b[ias]; has a bias) -> bdim of the result
FORWARD_CASES: dict[tuple[str, bool], int | None] = {
    ("", False): None,
    ("x", False): 0,
    ("w", False): 1,
    ("xw", False): 1,
    ("", True): None,
    ("x", True): 0,
    ("w", True): 0,
    ("xw", True): 0,
    ("b", True): 0,
    ("xb", True): 0,
    ("wb", True): 0,
    ("xwb", True): 0,
}

# (batched operands of g[rad_output], x, w[eight]; transposed; G > 1)
# -> bdims of the input and of the weight gradient
BACKWARD_CASES: dict[tuple[str, bool, bool], tuple[int | None, int | None]] = {
    ("", False, False): (None, None),
    ("", False, True): (None, None),
    ("", True, False): (None, None),
    ("", True, True): (None, None),
    ("g", False, False): (0, 0),
    ("g", False, True): (0, 0),
    ("g", True, False): (0, 1),
    ("g", True, True): (0, 1),
    ("x", False, False): (None, 1),
    ("x", False, True): (None, 1),
    ("x", True, False): (None, 0),
    ("x", True, True): (None, 0),
    ("w", False, False): (1, None),
    ("w", False, True): (1, None),
    ("w", True, False): (1, None),
    ("w", True, True): (1, None),
    ("gx", False, False): (0, 0),
    ("gx", False, True): (0, 0),
    ("gx", True, False): (0, 0),
    ("gx", True, True): (0, 0),
    ("gw", False, False): (1, 0),
    ("gw", False, True): (1, 0),
    ("gw", True, False): (1, 1),
    ("gw", True, True): (1, 1),
    ("xw", False, False): (1, 1),
    ("xw", False, True): (1, 1),
    ("xw", True, False): (1, 0),
    ("xw", True, True): (1, 0),
    ("gxw", False, False): (1, 0),
    ("gxw", False, True): (1, 0),
    ("gxw", True, False): (1, 0),
    ("gxw", True, True): (1, 0),
}


@dataclass(frozen=True)
class Operands:
    """Tensors with their bdims, and the arguments of the convolution they belong to."""

    g: Tensor
    g_bdim: int | None
    x: Tensor
    x_bdim: int | None
    w: Tensor
    w_bdim: int | None
    b: Tensor | None
    b_bdim: int | None
    batch: int
    conv: dict[str, Any]

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(**self.conv)

    @property
    def forward(self) -> tuple:
        return self.x, self.x_bdim, self.w, self.w_bdim, self.b, self.b_bdim

    @property
    def backward(self) -> tuple:
        return self.g, self.g_bdim, self.x, self.x_bdim, self.w, self.w_bdim

    @property
    def is_symmetric(self) -> bool:
        """Whether PyTorch's operator takes the padding."""
        return all(isinstance(p, int) for p in self.conv["padding"])

    @property
    def operator_arguments(self) -> tuple:
        c = self.conv
        return c["stride"], c["padding"], c["dilation"], c["transposed"], c["output_padding"], c["groups"]

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        return oracle.convolve(x, w, **self.conv)


def entries(t: Tensor, bdim: int | None, batch: int) -> list[Tensor]:
    return [t] * batch if bdim is None else list(t.unbind(bdim))


def stacked(t: Tensor, bdim: int | None, batch: int) -> Tensor:
    """A rule's result with `B` in front, repeated where it has none."""
    return t.expand(batch, *t.shape) if bdim is None else t.movedim(bdim, 0)


def operands(
    batched: str,
    transposed: bool,
    groups: int,
    rank: int,
    *,
    bias: bool = False,
    batch: int = 2,
    samples: int = 2,
    channels: tuple[int, int] = (2, 3),
    kernel: int = 2,
    spatial: int = 4,
    stride: int = 1,
    padding: Any = 0,
    dilation: int = 1,
    bdim: int = 0,
) -> Operands:
    """One plain set of operands, the same each time, `B` at `bdim` of each batched one."""
    conv = {
        "stride": (stride,) * rank,
        "padding": (padding,) * rank,
        "dilation": (dilation,) * rank,
        "transposed": transposed,
        "output_padding": (0,) * rank,
        "groups": groups,
    }
    out_per_group, in_per_group = channels
    return _build(
        torch.Generator().manual_seed(0),
        batch,
        (samples, groups * in_per_group, *(spatial,) * rank),
        _weight_shape(groups, out_per_group, in_per_group, (kernel,) * rank, transposed),
        conv,
        dict.fromkeys(batched, bdim),
        {},
        bias,
    )


def _weight_shape(groups, out_per_group, in_per_group, kernel, transposed) -> tuple[int, ...]:
    first, second = (in_per_group, out_per_group) if transposed else (out_per_group, in_per_group)
    return (groups * first, second, *kernel)


def _build(generator, batch, x_shape, w_shape, conv, bdims, layouts, bias) -> Operands:
    # of one sample, since torch does not run every empty batch
    one = torch.zeros(1, *x_shape[1:], dtype=torch.float64)
    out = oracle.convolve(one, torch.zeros(w_shape, dtype=torch.float64), **conv).shape[1:]

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        shape = tuple(shape)
        if name in bdims:
            at = bdims[name] % (len(shape) + 1)
            shape = (*shape[:at], batch, *shape[at:])
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return lay_out(t, layouts.get(name, "contiguous"))

    return Operands(
        tensor("g", (x_shape[0], *out)),
        bdims.get("g"),
        tensor("x", x_shape),
        bdims.get("x"),
        tensor("w", w_shape),
        bdims.get("w"),
        tensor("b", (out[0],)) if bias else None,
        bdims.get("b"),
        batch,
        conv,
    )


@st.composite
def drawn_operands(
    draw: st.DrawFn, batched: str, transposed: bool, grouped: bool, rank: int, bias: bool = False
) -> Operands:
    """Operands of a case: B up to 3 at any position, any geometry, any memory layout."""

    def axes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    kernel, stride, dilation = axes(1, 3 if rank < 3 else 2), axes(1, 3), axes(1, 2)
    if draw(st.integers(0, 3)):
        padding: Any = axes(0, 2)
        ends = [(p, p) for p in padding]
    else:
        ends = padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank)]
    output_padding = (0,) * rank
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        output_padding = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        least = [
            1 + max(0, -(-(sum(p) + 1 - r - o) // s))
            for p, r, o, s in zip(ends, reach, output_padding, stride, strict=True)
        ]
    else:
        least = [max(1, r - sum(p)) for r, p in zip(reach, ends, strict=True)]
    spatial = tuple(a + b for a, b in zip(least, axes(0, 2), strict=True))
    groups = draw(st.integers(2, 3)) if grouped else 1
    out_per_group, in_per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    conv = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "transposed": transposed,
        "output_padding": output_padding,
        "groups": groups,
    }
    ranks = {"g": rank + 2, "x": rank + 2, "w": rank + 2, "b": 1}
    bdims = {name: draw(st.integers(-ranks[name] - 1, ranks[name])) for name in batched}
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in "gxw"}
    return _build(
        torch.Generator().manual_seed(draw(st.integers(0, 2**16))),
        draw(st.integers(1, 3)),
        (draw(st.integers(1, 3)), groups * in_per_group, *spatial),
        _weight_shape(groups, out_per_group, in_per_group, kernel, transposed),
        conv,
        bdims,
        layouts,
        bias,
    )
