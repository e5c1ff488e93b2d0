"""Recurrent states, `[layers, N, features]`: among a model's inputs and its results."""

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn

from psgrad import CaptureError, PerSampleGrads, RefusedModelError, clip_per_sample

WITH_CELL = (DPLSTM, nn.LSTM)


class Reader(nn.Module):
    def __init__(self, kind, layers, bidirectional=False, mixes=False, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.mixes, self.time = mixes, 1 if batch_first else 0
        self.rnn = kind(4, 6, num_layers=layers, batch_first=batch_first, bidirectional=bidirectional)
        self.head = nn.Linear(12 if bidirectional else 6, 3)
        self.double()

    def forward(self, x, state=None):
        state = state.flip(1) if self.mixes else state
        out, state = self.rnn(x if self.time else x.transpose(0, 1), state)
        return self.head(out.select(self.time, -1)), state


def batch(samples, layers, kind=DPGRU):
    torch.manual_seed(1)
    x = torch.randn(samples, 5, 4, dtype=torch.float64)
    h, c = (torch.randn(layers, samples, 6, dtype=torch.float64) for _ in range(2))
    return x, torch.randint(3, (samples,)), (h, c) if kind in WITH_CELL else h


def column(state, i):
    return (
        tuple(column(s, i) for s in state) if isinstance(state, tuple) else state[:, i : i + 1].contiguous()
    )


def one_by_one(model, x, y, state):
    grads = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1], column(state, i))[0], y[i : i + 1])
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(of_one) for of_one in zip(*grads, strict=True)]


@pytest.mark.parametrize(("samples", "layers"), [(3, 1), (3, 2), (2, 3), (5, 2)])
@pytest.mark.parametrize("kind", [DPLSTM, DPGRU, DPRNN, nn.LSTM, nn.GRU, nn.RNN])
def test_a_state_among_the_inputs(kind, samples, layers):
    model, (x, y, state) = Reader(kind, layers), batch(samples, layers, kind)
    expected = one_by_one(model, x, y, state)
    handle = PerSampleGrads(model)
    for _ in range(2):  # the second batch runs without trials
        out, following = model(x, state)
        F.cross_entropy(out, y).backward()
        for p, grads in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad_sample, grads)
    assert (following[0] if kind in WITH_CELL else following).shape == (layers, samples, 6)
    handle.remove()


def test_both_directions():
    model, (x, y, state) = Reader(DPGRU, 2, bidirectional=True), batch(3, 4)
    expected = one_by_one(model, x, y, state)
    with PerSampleGrads(model):
        F.cross_entropy(model(x, state)[0], y).backward()
        for p, grads in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad_sample, grads)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_state_among_the_results_passes_for_no_samples(layers):
    """With two layers it has two rows, as the trial for mixed samples has."""
    model, (x, y, _) = Reader(DPLSTM, layers), batch(4, layers)
    with clip_per_sample(model, 1.0):
        F.cross_entropy(model(x)[0], y).backward()


def test_a_state_that_reaches_another_sample_is_refused():
    model, (x, _, state) = Reader(DPGRU, 3, mixes=True), batch(4, 3)
    with clip_per_sample(model, 1.0), pytest.raises(RefusedModelError, match="mixes samples"):
        model(x, state)


def test_a_layer_with_time_first_and_a_state_is_refused():
    """Neither has the batch in front: nothing tells the samples of the layer apart."""
    model, (x, _, state) = Reader(DPGRU, 3, batch_first=False), batch(4, 3)
    with clip_per_sample(model, 1.0), pytest.raises(CaptureError, match="let the batch come first"):
        model(x, state)
