"""Recurrent cells and networks by their formulas, as `torch.nn` documents them, of linear maps with a rule.

Their own kernels are one call for all that they compute of their parameters, of which nothing is handed over,
and which vmap cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from psgrad.errors import CaptureError

__all__ = ["PACKED", "RECURRENT", "run_packed"]

Linear = Callable[..., Tensor]
"""Computes `F.linear`."""
State = tuple[Tensor, ...]
"""`N H`, and an LSTM's `N H` of the cell besides."""
Step = Callable[[Tensor, Tensor, State], State]
"""The next state of what the input says to the cell's G gates `N(GH)`, what the state does, and the state."""


def _lstm(from_x: Tensor, from_h: Tensor, state: State) -> State:
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(from_x: Tensor, from_h: Tensor, state: State) -> State:
    x, h = from_x.chunk(3, -1), from_h.chunk(3, -1)
    r, z = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
    n = (x[2] + r * h[2]).tanh()
    return ((1 - z) * n + z * state[0],)


def _tanh(from_x: Tensor, from_h: Tensor, state: State) -> State:
    return ((from_x + from_h).tanh(),)


def _relu(from_x: Tensor, from_h: Tensor, state: State) -> State:
    return ((from_x + from_h).relu(),)


def _cell(
    step: Step,
    linear: Linear,
    x: Tensor,
    state: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """One step, as `torch.lstm_cell` and its like."""
    several = not isinstance(state, Tensor)
    state = tuple(state) if several else (state,)
    state = step(linear(x, w_ih, b_ih), linear(state[0], w_hh, b_hh), state)
    return state if several else state[0]


def _network(
    step: Step,
    linear: Linear,
    x: Tensor,
    first: Any,
    weights: Any,
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    *batch_first: bool,
    lengths: Tensor | None = None,
) -> State:
    """All steps of all layers, as `torch.lstm` and its like; of every sample its first `lengths` `N`, or all.

    Raises
    ------
    CaptureError
        If x is the data of a packed sequence, whose rows are not the batch's.

    """
    if isinstance(weights, Tensor):  # how many samples each step has came in between
        raise CaptureError(PACKED)
    x = x if batch_first[0] else x.transpose(0, 1)  # N T F
    states = (first,) if isinstance(first, Tensor) else tuple(first)  # each (layers directions) N H
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    last: list[State] = []
    for layer in range(layers):
        x = F.dropout(x, dropout, training) if layer else x
        out = []
        for direction in range(directions):
            n = len(last)
            own = weights[n * each : (n + 1) * each]
            state = tuple(s[n] for s in states)
            steps, state = _direction(
                step, linear, x, state, own, has_biases, lengths, backwards=direction == 1
            )
            out.append(steps)
            last.append(state)
        x = torch.cat(out, -1) if bidirectional else out[0]
    ends = (torch.stack(end) for end in zip(*last, strict=True))
    return (x if batch_first[0] else x.transpose(0, 1), *ends)


def _direction(
    step: Step,
    linear: Linear,
    x: Tensor,
    state: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    """N T F, state -> N T H, state: one layer in one direction."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    w_hr = rest[-1] if len(rest) % 2 else None  # of proj_size
    from_x = list(enumerate(linear(x, w_ih, b_ih).unbind(1)))  # of all steps at once
    steps = []
    for t, gates in reversed(from_x) if backwards else from_x:
        before, state = state, step(gates, linear(state[0], w_hh, b_hh), state)
        if w_hr is not None:
            state = (linear(state[0], w_hr, None), *state[1:])
        if lengths is not None:  # at its end a sample's state stays, backwards it begins there
            goes_on = (t < lengths).unsqueeze(1)
            state = tuple(torch.where(goes_on, *both) for both in zip(state, before, strict=True))
        steps.append(state[0])
    return torch.stack(steps[::-1] if backwards else steps, 1), state


STEPS: dict[str, Step] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}
"""By the mode of an `nn.RNNBase`."""

PACKED = (
    "got a packed sequence, in whose rows the samples lie mixed, where it runs one sample at a time: give it "
    "the padded one, and leave out of what it returns what is of the padding"
)


def run_packed(module: nn.RNNBase, packed: PackedSequence, first: Any = None) -> tuple[PackedSequence, Any]:
    """Compute `module(packed, first)`, on the padded sequence: its rows are the batch's, in their order."""
    x, lengths = pad_packed_sequence(packed, batch_first=True)
    if first is None:
        count = module.num_layers * (2 if module.bidirectional else 1)
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)
        states = tuple(x.new_zeros(count, len(x), size) for size in sizes)
        first = states if module.mode == "LSTM" else states[0]
    options = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional, True)
    out, *ends = _network(
        STEPS[module.mode], F.linear, x, first, module._flat_weights, *options, lengths=lengths.to(x.device)
    )
    order = packed.sorted_indices
    if order is not None:
        out, lengths = out[order], lengths[order.cpu()]
    data = pack_padded_sequence(out, lengths, batch_first=True).data
    again = PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)
    return again, tuple(ends) if module.mode == "LSTM" else ends[0]


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: partial(_cell, _lstm),
    torch.gru_cell: partial(_cell, _gru),
    torch.rnn_tanh_cell: partial(_cell, _tanh),
    torch.rnn_relu_cell: partial(_cell, _relu),
    torch.lstm: partial(_network, _lstm),
    torch.gru: partial(_network, _gru),
    torch.rnn_tanh: partial(_network, _tanh),
    torch.rnn_relu: partial(_network, _relu),
}
"""By torch's function: the same, given first what computes `F.linear`."""
