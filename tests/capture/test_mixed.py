"""A model that mixes samples, in whatever module, is refused on its first batch of more than one."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from psgrad import GradNorms, PerSampleGrads, RefusedModelError, clip_per_sample
from tests.capture.unknown import product
from tests.model_oracle import grads_one_by_one, squared_loss

HANDLES = {
    "grads": PerSampleGrads,
    "norms": GradNorms,
    "clip": lambda model, **options: clip_per_sample(model, 1.0, **options),
    "clip within a budget": lambda model, **options: clip_per_sample(
        model, 1.0, memory_budget=1000, **options
    ),
}


class Does(nn.Module):
    def __init__(self, do):
        super().__init__()
        self.do = do

    def forward(self, *args, **kwargs):
        return self.do(*args, **kwargs)


def model_of(do):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), Does(do), nn.Linear(6, 2))


def from_the_one_before(h):
    return torch.cat([h[:1], h[1:] + 1e-3 * h[:-1]])


MIXING = {
    "mean": lambda h: h - h.mean(0),
    "largest": lambda h: h / h.abs().max(),
    "running": lambda h: h.cumsum(0),
    "the one before": from_the_one_before,
    "the one after": lambda h: from_the_one_before(h.flip(0)).flip(0),
    "attention": lambda h: torch.softmax(h @ h.T, 1) @ h,
}


@pytest.mark.parametrize("samples", [2, 3, 7])
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("handle", HANDLES)
def test_refused_by_path(handle, name, samples):
    model = model_of(MIXING[name])
    with HANDLES[handle](model), pytest.raises(RefusedModelError, match=r"^1 \(Does\): mixes samples"):
        model(torch.randn(samples, 3))


def test_a_batch_of_one_says_nothing_and_the_next_is_asked():
    model = model_of(MIXING["mean"])
    with PerSampleGrads(model):
        for _ in range(2):
            squared_loss(model, torch.randn(1, 3)).backward()
        with pytest.raises(RefusedModelError, match=r"1 \(Does\)"):
            model(torch.randn(2, 3))


def test_rows_of_one_sample_may_meet():
    def pairs(h):
        return h - h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0)

    x = torch.randn(6, 3)
    with PerSampleGrads(model_of(pairs), rows_per_sample=2) as handle:
        squared_loss(handle._capture._module, x).backward()
    model = model_of(MIXING["mean"])
    with PerSampleGrads(model, rows_per_sample=2), pytest.raises(RefusedModelError, match="Does"):
        model(x)


def test_mixing_by_a_module_with_layers():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x) + x.sum()

    with PerSampleGrads(Reads()) as handle, pytest.raises(RefusedModelError, match=r"^the model itself"):
        handle._capture._module(torch.randn(3, 3))


class Own(nn.Module):
    """Mixes by means of parameters of its own: `do(self, h)`."""

    def __init__(self, do):
        super().__init__()
        self.do = do
        self.row, self.square = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 6))
        self.centre, self.drop = Does(lambda h: h - h.mean(0)), nn.Dropout(0.5)

    def forward(self, h):
        return self.do(self, h)


OWN = {
    "batch norm": lambda self, h: (h - h.mean(0)) / (h.std(0, correction=0) + 1e-3) * self.row,
    "centred": lambda self, h: h * self.row - h.mean(0),
    "centred in a child": lambda self, h: self.centre(h) * self.row,
    "attention": lambda self, h: torch.softmax(h @ self.square @ h.T, 1) @ h,
    "running": lambda self, h: (h @ self.square).cumsum(0),
    "beside dropout": lambda self, h: self.centre(self.drop(h)) * self.row,
    "beside another result": lambda self, h: [h @ self.square, h * self.row - h.mean(0)][1],
}


@pytest.mark.parametrize("samples", [2, 3, 7])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("handle", HANDLES)
def test_a_module_that_mixes_with_its_own_parameters_is_refused_by_path(handle, name, samples):
    """One sample at a time it would compute something else, in which nothing is mixed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), Own(OWN[name]), nn.Linear(6, 2))
    with HANDLES[handle](model), pytest.raises(RefusedModelError, match=r"^1 \(Own\) mixes samples"):
        model(torch.randn(samples, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_model_itself_mixes_with_its_own_parameters(dtype):
    model = Own(OWN["batch norm"]).to(dtype)
    with PerSampleGrads(model):
        for _ in range(2):  # of one sample, which says nothing
            model(torch.randn(1, 6, dtype=dtype)).sum()
        with pytest.raises(RefusedModelError, match=r"^the model itself \(Own\) mixes"):
            model(torch.randn(4, 6, dtype=dtype))


def test_a_module_that_mixes_inside_of_another_and_beside_it():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = Own(OWN["centred"]), nn.Parameter(torch.randn(6))

        def forward(self, h):
            return self.inner(h * self.scale)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.around = nn.Linear(6, 6), Around()

        def forward(self, x):
            return self.around.inner(self.around(self.linear(x)) + x)

    model = Twice()
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"^around \(Around\) mixes"):
        model(torch.randn(4, 6))


def test_rows_of_one_sample_may_meet_in_a_module_with_its_own_parameters():
    def pairs(self, h):
        means = h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0)
        return product(h, self.square) - means

    model = Own(pairs).double()
    x = torch.randn(6, 6).double()
    expected = grads_one_by_one(model, squared_loss, [x], 2)
    with PerSampleGrads(model, rows_per_sample=2) as handle:
        squared_loss(model, x).backward()
        assert list(handle.regions) == [""]
    torch.testing.assert_close(model.square.grad_sample, expected["square"])


class Puts(nn.Module):
    """Does something to the batch in another order, and puts it back."""

    def __init__(self, order, within):
        super().__init__()
        self.order, self.within = order, within

    def forward(self, h):
        order = self.order(h)
        return self.within(h[order])[order.argsort()]


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, h):
        return h * self.scale


class Projects(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, h):
        return product(h, self.weight)


class Multiplies(Projects):
    def forward(self, h):
        return h @ self.weight


@pytest.mark.parametrize("within", [lambda: nn.Linear(3, 3), Scales, Projects, Multiplies])
@pytest.mark.parametrize(
    "first", [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1], [1, 2], [2, 1]]
)
def test_a_layer_whose_rows_were_sorted_is_refused(first, within):
    model = nn.Sequential(Puts(lambda h: h[:, 0].argsort(), within()), nn.Linear(3, 2))
    x = torch.tensor([[float(k), 1.0, 2.0] for k in first])
    with (
        PerSampleGrads(model),
        pytest.raises(RefusedModelError, match=r"0\.within .*in another order|^Scales|^Multiplies"),
    ):
        model(x)


@pytest.mark.parametrize(
    "order", [lambda h: torch.arange(len(h)).flip(0), lambda h: torch.arange(len(h)).roll(1)]
)
def test_a_layer_whose_rows_were_moved_is_refused(order):
    model = nn.Sequential(nn.Linear(3, 3), Puts(order, nn.Linear(3, 3)), nn.Linear(3, 2))
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"1\.within .*in another order"):
        model(torch.randn(4, 3))


def test_two_steps_in_front_are_no_samples():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x.transpose(0, 1)).mean(0)

    model = TimeFirst()
    with PerSampleGrads(model) as handle:
        model(torch.randn(5, 2, 3)).square().mean().backward()
        assert list(handle.regions) == [""]


def test_an_owner_that_sorts_around_its_parameter_is_refused():
    class Sorts(Scales):
        def forward(self, h):
            order = h[:, 0].argsort()
            return (h[order] * self.scale)[order.argsort()]

    model = nn.Sequential(nn.Linear(3, 3), Sorts(), nn.Linear(3, 2))
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"Sorts .*in another order"):
        model(torch.randn(4, 3))


def noise_from_numpy(h):
    return h + torch.from_numpy(np.random.default_rng().normal(size=h.shape)).float()


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        return h * (1 + 0 * self.calls)


def longest_first(h):
    order = h.sum(1).argsort(descending=True)
    return h[order].tanh()[order.argsort()]


APART = {
    "dropout": nn.Dropout(0.5),
    "noise by need": nn.RReLU(),
    "noise from elsewhere": Does(noise_from_numpy),
    "counts": Counts(),
    "longest first": Does(longest_first),
    "not finite": Does(lambda h: torch.where(h > 0, h, torch.inf).exp().clamp(max=5)),
}


@pytest.mark.parametrize("name", APART)
def test_not_refused(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), APART[name], nn.Linear(6, 2))
    x = torch.randn(5, 3)
    torch.manual_seed(1)
    expected = model(x)
    buffers = {path: b.clone() for path, b in model.named_buffers()}
    with PerSampleGrads(model):
        torch.manual_seed(1)
        out = model(x)
    if name != "noise from elsewhere":
        assert torch.equal(out, expected)  # the same random numbers
    for path, b in model.named_buffers():
        assert torch.equal(b, buffers[path] + 1)  # counted once


def test_a_loss_that_the_model_returns_beside_its_outputs_is_no_mixing():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, labels):
            out = self.linear(x)
            return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}

    model = WithLoss()
    with PerSampleGrads(model):
        model(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))["loss"].backward()
    assert model.linear.weight.grad_sample.shape == (4, 2, 3)


def test_tokens_are_exchanged_for_others_of_the_batch():
    model = nn.Sequential(nn.Embedding(9, 4), Does(lambda h: h - h.mean(0)), nn.Linear(4, 2))
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"1 \(Does\)"):
        model(torch.tensor([[0, 1], [8, 3], [2, 2]]))


@dataclass
class Returned:
    logits: torch.Tensor
    at: int = 0


@pytest.mark.parametrize(
    "wrap", [Returned, lambda h: [{"one": Returned(h)}], lambda h: torch.distributions.Normal(h, 1.0)]
)
def test_mixing_is_seen_in_a_models_own_types(wrap):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            h = self.linear(x)
            return wrap(h - h.mean(0))

    model = Centred()
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match="mixes samples"):
        model(torch.randn(4, 3))
