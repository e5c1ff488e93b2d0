"""A layer that is called several times is clipped by the sum of its calls, which nobody writes out."""

from functools import reduce

import pytest
import torch
from torch import nn

from psgrad import clip_per_sample
from psgrad.layers.linear import Linear
from psgrad.repeated_use import repeated
from tests.model_oracle import grads_one_by_one, squared_loss


class Recurrent(nn.Module):
    """One linear layer and one convolution, called at every step; their rows are of one shape or not."""

    def __init__(self, width, alike):
        super().__init__()
        self.step = nn.Linear(width, width)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.alike = alike

    def forward(self, x):
        state = x[:, 0]
        for t in range(1, x.shape[1]):
            state = torch.tanh(self.step(state) + x[:, t])
            seen = state if self.alike else state[:, t % 2 :]
            state = state + self.conv(seen.unsqueeze(1)).mean((1, 2)).unsqueeze(1)
        # where not alike, the last call has an axis more
        return self.step(state if self.alike else state.unsqueeze(1)).flatten(1)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("rows_per_sample", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 30])  # 30 calls are larger than the gradient
def test_clipped_sum_is_that_of_the_loop(steps, rows_per_sample, alike):
    torch.manual_seed(0)
    model = Recurrent(8, alike).double()
    x = torch.randn(6, steps, 8, dtype=torch.double)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    factors = (norms.median() / norms).clamp(max=1)
    with clip_per_sample(model, norms.median().item(), "sum", rows_per_sample=rows_per_sample) as clip:
        (squared_loss(model, x) * len(norms)).backward()
    torch.testing.assert_close(clip.result.norms, norms)
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad, torch.tensordot(factors, expected[path], 1), msg=path)


@pytest.mark.parametrize(("steps", "written"), [(10, False), (200, True)])
def test_gradients_are_written_out_only_when_the_calls_are_larger(steps, written, monkeypatch):
    """64 x 64 weights and 64 biases a sample against 128 numbers a call: every 33 calls."""
    made = []
    grads = Linear.grads
    monkeypatch.setattr(Linear, "grads", lambda self, call: (made.append(call.x.shape), grads(self, call))[1])
    model = Recurrent(64, True)
    model.conv.requires_grad_(False)
    with clip_per_sample(model, 1.0):
        squared_loss(model, torch.randn(4, steps, 64)).backward()
    whole, rest = divmod(steps, 33)
    expected = [4 * 33] * whole + [4 * rest] if written else []
    assert [shape[0] for shape in made] == expected


def test_what_was_written_out_is_among_the_tensors_that_are_held():
    """A memory budget counts them."""
    uses = []
    model = Recurrent(8, True)
    with clip_per_sample(model, 1.0) as clip:
        add = clip.add
        clip.add = lambda use: (uses.append(use), add(use))
        squared_loss(model, torch.randn(3, 7, 8)).backward()
    together = reduce(repeated, [use for use in uses if use.path == "step"])
    parts = [*together.uses, together.written]  # 64 weights and 8 biases against 16 numbers a call
    assert {id(t) for t in together.tensors()} == {id(t) for part in parts for t in part.tensors()}


def test_norms_and_sums_are_computed_without_autocast():
    """Those of several calls come when backward has ended, which may be in autocast still."""
    seen = []
    model = Recurrent(8, True)
    with clip_per_sample(model, 1.0) as clip:
        finish = clip.finish
        clip.finish = lambda n: (seen.append(torch.is_autocast_enabled("cpu")), finish(n))
        with torch.autocast("cpu", torch.bfloat16):
            squared_loss(model, torch.randn(3, 4, 8)).backward()
    assert seen == [False]
