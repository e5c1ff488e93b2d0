"""Recurrent cells by their formulas, as `torch.nn` documents them: vmap cannot run their kernels at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CELLS"]

Linear = Callable[..., Tensor]
"""Computes `F.linear`."""


def _gates(
    linear: Linear,
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """BI, BH -> B(GH), B(GH): what the input says to the cell's G gates, and what the state does."""
    return linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)


def _lstm(linear: Linear, x: Tensor, state: tuple[Tensor, Tensor], *parameters: Any) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = torch.add(*_gates(linear, x, h, *parameters)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(linear: Linear, x: Tensor, h: Tensor, *parameters: Any) -> Tensor:
    from_x, from_h = (gates.chunk(3, 1) for gates in _gates(linear, x, h, *parameters))
    r, z = ((a + b).sigmoid() for a, b in zip(from_x[:2], from_h[:2], strict=True))
    n = (from_x[2] + r * from_h[2]).tanh()
    return (1 - z) * n + z * h


def _rnn_tanh(linear: Linear, x: Tensor, h: Tensor, *parameters: Any) -> Tensor:
    return torch.add(*_gates(linear, x, h, *parameters)).tanh()


def _rnn_relu(linear: Linear, x: Tensor, h: Tensor, *parameters: Any) -> Tensor:
    return torch.add(*_gates(linear, x, h, *parameters)).relu()


CELLS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _rnn_tanh,
    torch.rnn_relu_cell: _rnn_relu,
}
"""By torch's function: the same, given first what computes `F.linear`."""
