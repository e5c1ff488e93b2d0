"""Embeddings that are looked up once for the whole batch: position tables."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, PerSampleGrads, clip_per_sample
from tests.capture.test_direct import assert_exact
from tests.model_oracle import grads_one_by_one, squared_loss

STEPS = 5


class Decoder(nn.Module):
    """Token and position embeddings as in GPT-2, added up by `use(self, tokens, positions)`."""

    def __init__(self, use, index):
        super().__init__()
        self.use = use
        self.index = index
        self.tokens = nn.Embedding(7, 3)
        self.positions = nn.Embedding(9, 3)
        self.scale = nn.Parameter(torch.randn(3))
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        steps = self.index(x)
        return self.last(torch.tanh(self.use(self, self.tokens(x), self.positions(steps))))


ONE_ROW, NO_ROWS = (lambda x: torch.arange(x.shape[1])[None]), (lambda x: torch.arange(x.shape[1]))
KNOWN = {
    "added": lambda self, h, p: h + p,
    "added first": lambda self, h, p: p.to(h.device) + h,
    "in place": lambda self, h, p: h.clone().add_(p),
    "multiplied": lambda self, h, p: h * (1 + p.sin()),
    "a part": lambda self, h, p: h + p[..., : h.shape[1], :].view(1, -1, 3),
    "with axes": lambda self, h, p: h + p.reshape(-1, 3).unsqueeze(0),
    "expanded": lambda self, h, p: h + p.reshape(1, -1, 3).expand(len(h), -1, -1),
    "expanded as": lambda self, h, p: h * p.reshape(1, -1, 3).expand_as(h),
    "twice": lambda self, h, p: h * p + p,
    "looked up twice": lambda self, h, p: h + p * self.positions(torch.tensor([2])),
}
UNKNOWN = {
    "with another parameter": lambda self, h, p: h + p * self.scale,
    "by a layer": lambda self, h, p: h + self.last(p).mean(-1, keepdim=True),
    "matrix": lambda self, h, p: h @ p.reshape(-1, 3).mT @ p.reshape(-1, 3),
    "dropped at random": lambda self, h, p: h + nn.functional.dropout(p, 0.5) * 0,
    "beside": lambda self, h, p: torch.cat([h, p.reshape(1, -1, 3).repeat(len(h), 1, 1).flip(0)], 1),
}


def decoder(use, index):
    torch.manual_seed(0)
    model = nn.Sequential(Decoder(use, index), nn.Linear(2, 2)).double()
    if "scale" not in use.__code__.co_names:
        model[0].scale = None
    return model


@pytest.mark.parametrize(("rows", "rows_per_sample"), [(1, 1), (STEPS, 1), (6, 1), (6, 2), (2 * STEPS, 2)])
@pytest.mark.parametrize("index", [ONE_ROW, NO_ROWS], ids=["one row", "no rows"])
@pytest.mark.parametrize("name", KNOWN | UNKNOWN)
def test_every_use(name, index, rows, rows_per_sample):
    x = torch.randint(7, (rows, STEPS))
    regions = assert_exact(decoder((KNOWN | UNKNOWN)[name], index), clip_per_sample, x, rows_per_sample)
    assert regions == (() if name in KNOWN else ("0",))


def test_a_longer_batch_and_an_empty_one():
    model = decoder(KNOWN["added"], NO_ROWS)
    with PerSampleGrads(model, "sum") as handle:
        for rows, steps in [(0, 4), (3, 4), (8, 8), (0, 6), (2, 9)]:
            model.zero_grad()
            model(torch.randint(7, (rows, steps))).sum().backward()
            assert model[0].positions.weight.grad_sample.shape == (rows, 9, 3)
            assert handle.regions == ()


def test_a_stand_in_that_is_returned_is_met_by_nobody():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.positions = nn.Embedding(9, 3)

        def forward(self, x):
            return self.linear(x), self.positions(torch.arange(4))

    model = Returns()
    with PerSampleGrads(model) as handle:
        model(torch.randn(2, 4, 3))[0].square().mean().backward()
        assert handle.regions == ("",)


def test_a_checkpoint_around_one_is_a_clear_error():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Decoder(KNOWN["added"], NO_ROWS)
            self.inner.scale = None

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"inner.positions .*out of the checkpoint"):
        squared_loss(model, torch.randint(7, (3, 4))).backward()


def test_a_layer_that_only_a_later_batch_gives_one_to():
    """As many rows in the table as in the batch: nothing but the stand-in tells them apart."""

    def use(self, h, p):
        return h + (self.last(p).mean(-1, keepdim=True) if self.late else p)

    model = decoder(use, NO_ROWS)
    x = torch.randint(7, (STEPS, STEPS))
    with PerSampleGrads(model) as handle:
        model[0].late = False
        squared_loss(model, x).backward()
        assert handle.regions == ()
        model[0].late = True
        model.zero_grad()
        expected = grads_one_by_one(model, squared_loss, [x])
        squared_loss(model, x).backward()
        assert handle.regions == ("0",)
        for path, p in model.named_parameters():
            torch.testing.assert_close(p.grad_sample, expected[path])


def test_an_embedding_of_all_words_in_a_row_makes_but_the_module_around_it_a_region():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 3)

        def forward(self, x):
            return self.words(x.flatten()).view(*x.shape, 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = Flat()
            self.positions = nn.Embedding(9, 3)
            self.norm = nn.LayerNorm(3)

        def forward(self, x):
            words = self.flat(x)
            return self.norm(words) + self.positions(torch.arange(x.shape[1]))

    torch.manual_seed(0)
    x = torch.randint(7, (4, STEPS))
    assert assert_exact(Model().double(), clip_per_sample, x) == ("flat",)
