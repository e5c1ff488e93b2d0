"""Embeddings that are looked up once for the whole batch: position tables."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, GradNorms, PerSampleGrads, clip_per_sample
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
    "one position": lambda self, h, p: h + p + self.positions(torch.tensor(3)),
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


USED_TWICE = {"one position": 5000, "looked up twice": 5000, "by a layer": 5000}
"""The norm of a sum needs both uses at once: bytes that are enough."""


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("rows", "rows_per_sample"), [(1, 1), (STEPS, 1), (6, 1), (6, 2), (2 * STEPS, 2)])
@pytest.mark.parametrize("index", [ONE_ROW, NO_ROWS], ids=["one row", "no rows"])
@pytest.mark.parametrize("name", KNOWN | UNKNOWN)
def test_every_use(name, index, rows, rows_per_sample, passes):
    x = torch.randint(7, (rows, STEPS))
    handle = clip_per_sample
    if passes == 2:
        handle = partial(clip_per_sample, memory_budget=USED_TWICE.get(name, 1))
    regions = assert_exact(decoder((KNOWN | UNKNOWN)[name], index), handle, x, rows_per_sample)
    assert regions == ([] if name in KNOWN else ["0"])


def test_a_longer_batch_and_an_empty_one():
    model = decoder(KNOWN["added"], NO_ROWS)
    with PerSampleGrads(model, "sum") as handle:
        for rows, steps in [(0, 4), (3, 4), (8, 8), (0, 6), (2, 9)]:
            model.zero_grad()
            model(torch.randint(7, (rows, steps))).sum().backward()
            assert model[0].positions.weight.grad_sample.shape == (rows, 9, 3)
            assert handle.regions == {}


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
        assert list(handle.regions) == [""]


class Checkpointed(nn.Module):
    """Runs embeddings, sums and layers again in backward."""

    def __init__(self, use):
        super().__init__()
        self.inner = decoder(use, NO_ROWS)
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("rows", [STEPS, 6])
@pytest.mark.parametrize("name", ["added", "multiplied", "looked up twice", "with another parameter"])
def test_a_checkpoint_around_one(name, rows):
    model = Checkpointed((KNOWN | UNKNOWN)[name]).double()
    assert_exact(model, clip_per_sample, torch.randint(7, (rows, STEPS)))


def test_two_checkpoints_before_their_backward():
    """What is run again knows the rows of the model's last call alone."""
    model = Checkpointed(KNOWN["added"]).double()
    x = torch.randint(7, (4, STEPS))
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model, "sum"):
        model(x)  # the first batch also tells what is looked up once
        (2 * squared_loss(model, x) + 2 * squared_loss(model, x)).backward()
        for path, p in model.named_parameters():
            torch.testing.assert_close(p.grad_sample, expected[path])  # of twice two means over four
        first = squared_loss(model, x)
        model(torch.randint(7, (6, STEPS)))
        with pytest.raises(CaptureError, match=r"inner.0.positions .*ran it again .*only with as many rows"):
            first.backward()


def test_one_that_is_called_by_itself():
    model = decoder(KNOWN["added"], NO_ROWS)
    with PerSampleGrads(model):
        squared_loss(model, torch.randint(7, (3, STEPS))).backward()
        with pytest.raises(CaptureError, match=r"0.positions .*by itself: call the model"):
            model[0].positions(torch.arange(3))
        with torch.no_grad():
            assert model[0].positions(torch.arange(3)).shape == (3, 3)


def test_a_layer_that_only_a_later_batch_gives_one_to():
    """As many rows in the table as in the batch: nothing but the stand-in tells them apart."""

    def use(self, h, p):
        return h + (self.last(p).mean(-1, keepdim=True) if self.late else p)

    model = decoder(use, NO_ROWS)
    x = torch.randint(7, (STEPS, STEPS))
    with PerSampleGrads(model) as handle:
        model[0].late = False
        squared_loss(model, x).backward()
        assert handle.regions == {}
        model[0].late = True
        model.zero_grad()
        expected = grads_one_by_one(model, squared_loss, [x])
        squared_loss(model, x).backward()
        assert list(handle.regions) == ["0"]
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
    assert assert_exact(Model().double(), clip_per_sample, x) == ["flat"]


def test_a_scalar_in_an_empty_first_batch():
    model = decoder(KNOWN["one position"], NO_ROWS)
    with PerSampleGrads(model, "sum") as handle:
        model(torch.randint(7, (0, STEPS))).sum().backward()
        assert model[0].positions.weight.grad_sample.shape == (0, 9, 3)
        assert handle.regions == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    torch.manual_seed(0)
    model = decoder(KNOWN["multiplied"], NO_ROWS).float()
    x = torch.randint(7, (4, STEPS))
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model) as handle, torch.autocast("cpu", dtype):
        squared_loss(model, x).backward()
        assert handle.regions == {}
    for path, p in model.named_parameters():
        error = (p.grad_sample - expected[path]).norm()
        assert error <= 0.05 * expected[path].norm(), path


def test_norms_alone():
    model = decoder(KNOWN["twice"], ONE_ROW)
    x = torch.randint(7, (6, STEPS))
    expected = grads_one_by_one(model, squared_loss, [x])
    with GradNorms(model) as norms:
        squared_loss(model, x).backward()
    squares = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0)
    torch.testing.assert_close(norms.norms, squares.sqrt())
