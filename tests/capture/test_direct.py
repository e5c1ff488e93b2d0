"""Parameters that a module uses itself: exact on the batch as a whole, and where that is not sure, apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, PerSampleGrads, clip_per_sample
from tests.capture.unknown import product
from tests.model_oracle import assert_clipped, grads_one_by_one, squared_loss


class Uses(nn.Module):
    """Runs `use(self, h)` on `h [N, T, 3]`, with parameters to do it with."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.inner = nn.Linear(3, 3)
        self.row = nn.Parameter(torch.randn(3))
        self.table = nn.Parameter(torch.randn(1, 5, 3))
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.square = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("constant", torch.randn(5, 3))

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return h + self.use(self, h).tanh().mean(1, keepdim=True)


def written_to(self, h):
    h = h * 1
    h += self.table
    h.mul_(self.row)
    return h


def caught(self, h):
    try:
        return product(h, self.square.tanh())
    except CaptureError:
        return h


def beside(self, h):
    return torch.cat([self.token.expand(len(h), -1, -1), h, self.row.repeat(len(h), 1, 1)], dim=1)


class Sums(nn.Module):
    def forward(self, h, p):
        return h + p.expand(len(h), 5, 3)


class Centred(nn.Module):
    def forward(self, h):
        return h - h.mean(0)


class HiddenBehindZeros(nn.Module):
    """Mixes, though nothing of it reaches the result before `last` has learned something."""

    def __init__(self):
        super().__init__()
        self.last = nn.Parameter(torch.zeros(3))
        self.centre = Centred()

    def forward(self, h):
        return h + self.last * self.centre(h)


def twice(self, h):
    h = h * self.row + self.table
    return torch.tanh(h) * self.row - self.table


KNOWN = {
    "scale": lambda self, h: self.row * h,
    "embedding": lambda self, h: h + self.table,
    "minus": lambda self, h: self.row - h / self.table.shape[1] - torch.sub(h, self.row, alpha=2),
    "quotient": lambda self, h: self.row / (h + 3) + h / (self.table.expand(len(h), -1, -1)),
    "in place": written_to,
    "beside": beside,
    "expanded in a child": lambda self, h: Sums()(h, self.token),
    "expand as": lambda self, h: h * self.token.expand_as(h),
    "linear": lambda self, h: F.linear(h, self.square, self.row),
    "layer norm": lambda self, h: F.layer_norm(h, (3,), self.row, self.inner.bias),
    "child's weight": lambda self, h: F.linear(h, self.inner.weight, self.row) * self.inner.bias,
    "twice": twice,
    "function": lambda self, h: h * self.row.sigmoid(),
    "two parameters": lambda self, h: h + (self.row + self.table),
    "part": lambda self, h: h + self.table[:, 1:4].mean(1, keepdim=True) * self.square[0, None],
    "moved": lambda self, h: h * self.table.to(h.dtype).transpose(0, 1)[:, 0].unsqueeze(0),
    "pieces": lambda self, h: h * self.square.split(1)[1] + self.square.unbind()[2],
    "repeated in itself": lambda self, h: h + self.row.expand(1, 5, -1) * self.token.repeat(1, 5, 1),
    "resized": lambda self, h: h + F.interpolate(self.table[:, :4].mT, 5, mode="linear").mT,
    "with a constant": lambda self, h: h + F.linear(self.constant[:5], self.square, self.row),
    "expanded once computed": lambda self, h: torch.cat([h, self.token.exp().expand(len(h), -1, -1)], 1),
    "an index": lambda self, h: h * self.row + self.square[self.row.argmax()],
    "detached": lambda self, h: h * self.row + self.row.detach(),
}
UNKNOWN = {
    "mean over copies": lambda self, h: h + self.token.expand(len(h), 5, 3).mean(0),
    "shuffled copies": lambda self, h: h + self.table.expand(len(h), -1, -1).flip(0),
    "beside in axis 0": lambda self, h: torch.cat([self.token.expand(len(h), 5, 3), h], 0)[-len(h) :],
    "beside copies only": lambda self, h: (
        h + torch.cat([self.token.expand(len(h), 4, 3)] * 2, 1).mean((0, 1))
    ),
    "plus zeros": lambda self, h: h + (self.token + h.new_zeros(len(h), 5, 3)).mean(0),
    "along the batch": lambda self, h: (h.transpose(0, 1) + self.table.transpose(0, 1)).transpose(0, 1),
    "matrix": lambda self, h: product(h, self.square),
    "caught": caught,
    "made for the occasion": lambda self, h: h + F.linear(torch.ones_like(h[0]), self.square, self.row),
    "counted": lambda self, h: h + self.table[0, torch.arange(5)],
    "written to": lambda self, h: h + self.row.sin().add_(1),
    "at random": lambda self, h: h + F.dropout(self.row, 0.5) * 0,
}


def model_of(use):
    torch.manual_seed(0)
    return nn.Sequential(Uses(use), nn.Linear(3, 2)).double()


def assert_exact(model, handle_of, x, rows_per_sample=1):
    """Norms and clipped sum are the oracle's; of parameters that the use leaves out, there are none."""
    for p in grads_unused(model, x):
        p.requires_grad_(False)
    return assert_clipped(model, x, handle_of, rows_per_sample)


def grads_unused(model, x):
    grads = torch.autograd.grad(squared_loss(model, x), list(model.parameters()), allow_unused=True)
    return [p for p, grad in zip(model.parameters(), grads, strict=True) if grad is None]


# the first and the last have as many rows, or samples, as there are steps
@pytest.mark.parametrize(("rows", "rows_per_sample"), [(5, 1), (6, 1), (6, 2), (10, 2)])
@pytest.mark.parametrize("name", KNOWN | UNKNOWN)
def test_every_use(name, rows, rows_per_sample):
    x = torch.randn(rows, 5, 3, dtype=torch.double)
    regions = assert_exact(model_of((KNOWN | UNKNOWN)[name]), clip_per_sample, x, rows_per_sample)
    assert regions == ([] if name in KNOWN else ["0"])


def test_a_use_that_only_a_later_batch_has():
    model = model_of(
        lambda self, h: h + (product(h, self.square) if h.shape[0] == 6 and self.late else self.table)
    )
    model[0].late = False
    x = torch.randn(6, 5, 3, dtype=torch.double)
    with PerSampleGrads(model[0]) as handle:
        squared_loss(model[0], x).backward()
        assert handle.regions == {}
        model[0].late = True
        expected = grads_one_by_one(model[0], squared_loss, [x])
        squared_loss(model[0], x).backward()
        assert list(handle.regions) == [""]
        for path, p in model[0].named_parameters():
            if p.grad_sample is not None and expected[path] is not None:
                torch.testing.assert_close(p.grad_sample, expected[path])


def test_a_use_that_only_a_later_batch_has_after_an_input_was_written_to():
    model = Late().double()
    x = torch.randn(4, 3, dtype=torch.double)
    with PerSampleGrads(model) as handle:
        squared_loss(model, x).backward()
        assert handle.regions == {}
        model.scaled.late = True
        with pytest.raises(CaptureError, match=r"scaled \(Scaled\): einsum of more .*copy the input"):
            model(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.late = False

    def forward(self, h):
        h += self.scale
        return product(h, self.scale.diag()) if self.late else h * self.scale


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scaled = Scaled()

    def forward(self, x):
        return self.scaled(self.linear(x))


def test_mixing_that_a_factor_of_zero_hides():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), HiddenBehindZeros(), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.double)
    assert assert_exact(model, clip_per_sample, x) == ["1"]


def test_a_stand_in_that_a_module_keeps_is_not_used_again():
    kept = []
    model = model_of(lambda self, h: (kept.append(self.row), h + self.row)[1])
    with PerSampleGrads(model):
        model(torch.randn(4, 5, 3, dtype=torch.double))
        with pytest.raises(CaptureError, match="got what Uses kept of a parameter"):
            torch.ones(4, 5, 3) + kept[-1]


def test_a_module_that_caches_what_it_computes_of_a_parameter_is_named():
    def cached(self, h):
        self.__dict__.setdefault("cache", self.row.exp())
        return h + self.cache

    model = model_of(cached)
    with (
        PerSampleGrads(model),
        pytest.raises(CaptureError, match=r"got what Uses kept of a parameter.*a cache"),
    ):
        model(torch.randn(4, 5, 3, dtype=torch.double))


def test_a_checkpoint_around_a_direct_use():
    torch.manual_seed(0)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = Uses(lambda self, h: h * self.row + self.table)
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return checkpoint(self.inside, x, use_reentrant=False) * self.scale

    assert assert_exact(Outer().double(), clip_per_sample, torch.randn(4, 5, 3, dtype=torch.double)) == []


@pytest.mark.parametrize("name", ["scale", "function", "part", "expanded once computed"])
def test_empty_batch_of_a_direct_use(name):
    model = model_of(KNOWN[name])
    with PerSampleGrads(model, "sum") as handle:
        squared_loss(model, torch.randn(4, 5, 3, dtype=torch.double)).backward()
        model.zero_grad()
        model(torch.randn(0, 5, 3, dtype=torch.double)).sum().backward()
        assert handle.regions == {}
    used = [p.grad_sample for p in model[0].parameters() if p.grad_sample is not None]
    assert len(used) > 2
    assert {len(grads) for grads in used} == {0}
