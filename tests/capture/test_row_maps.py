"""Norms through weights that are computed row by row: exact, and no sample's gradient is carried over."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from psgrad import clip_per_sample
from psgrad.capture import computed
from psgrad.capture.computed import Carried
from psgrad.capture.row_probes import row_maps
from tests.model_oracle import assert_clipped, grads_one_by_one, squared_loss


def by_row(numbers, w):
    """A number for each row, to be broadcast over it."""
    return numbers.reshape(-1, *(1,) * (w.ndim - 1))


def centred(w, *_):
    return w - by_row(w.flatten(1).mean(1), w)


def standardised(w, *_):
    return centred(w) / by_row((w.flatten(1).var(1, unbiased=False) + 1e-4).sqrt(), w)


def standardised_by_batch_norm(w, gain, _):
    as_one = w.reshape(1, len(w), -1)
    return F.batch_norm(as_one, None, None, gain.reshape(-1) * 0.3, training=True, eps=1e-6).reshape_as(w)


def over_its_deviation(w, *_):
    return w / by_row(w.flatten(1).std(1), w)


def normed(w, gain, _):
    return by_row(gain / w.flatten(1).norm(dim=1), w) * w


WITHOUT_GAIN = {
    "centred": centred,
    "standardised": standardised,
    "over its deviation": over_its_deviation,
    "scaled": lambda w, *_: 0.3 * w,
    "of another shape": lambda w, *_: w.flatten(1).view_as(w) * 2,
    "signs, straight through": lambda w, *_: w + (w.sign() - w).detach(),
    "twice": lambda w, *_: standardised(centred(w) * 3),
    "beside a constant": lambda w, _, numbers: w + numbers,
    "every other row": lambda w, _, rows: w * rows,
}
WITH_GAIN = {"standardised by batch_norm": standardised_by_batch_norm, "normed": normed}
BY_ROWS = WITHOUT_GAIN | WITH_GAIN
"""What is of the form, by name: of a weight, a gain with one number a row, and `NUMBERS`."""
OTHERWISE_WITHOUT_GAIN = {
    "masked": lambda w, _, mask: w * mask,
    "one element scaled": lambda w, _, numbers: w * numbers,
    "rows mixed": lambda w, *_: w + 0.1 * w.roll(1, 0),
    "over the norm of all": lambda w, *_: w / w.norm(),
    "apart from the mean of all": lambda w, *_: w - w.mean(),
    "turned": lambda w, *_: w.flatten(1).flip(1).reshape(w.shape),
}
OTHERWISE_WITH_GAIN = {
    "scaled by columns": lambda w, gain, columns: gain.view(-1)[columns] * w,
    "a gain beside": lambda w, gain, numbers: w + by_row(gain, w) * numbers,
    "gains mixed": lambda w, gain, _: by_row(gain + gain.roll(1, 0), w) * w,
}
OTHERWISE = OTHERWISE_WITHOUT_GAIN | OTHERWISE_WITH_GAIN
"""What is of another form."""
NUMBERS = {
    "every other row": lambda numbers: by_row(torch.arange(len(numbers)), numbers) % 2,
    "masked": lambda numbers: numbers % 5 != 2,
    "one element scaled": lambda numbers: 1 + 1e-3 * (numbers == 7),
    "scaled by columns": lambda numbers: (numbers % len(numbers)).long(),
}
"""By name: constants of the weight's shape, made of 0, 1, 2 ..; else random ones."""

LAYERS = {
    "linear": ((6, 5), (7, 5), lambda h, w, b: F.linear(h, w, b)),
    "linear, vectors": ((6, 5), (5,), lambda h, w, b: F.linear(h, w, b)),
    "conv1d": ((6, 4, 3), (4, 9), lambda h, w, b: F.conv1d(h, w, b, padding=1)),
    "conv2d": ((6, 4, 3, 3), (4, 6, 5), lambda h, w, b: F.conv2d(h, w, b, stride=2, padding=1)),
    "conv2d, groups": ((6, 2, 3, 3), (4, 6, 5), lambda h, w, b: F.conv2d(h, w, b, groups=2)),
    "conv2d, depthwise": ((6, 1, 3, 3), (6, 6, 5), lambda h, w, b: F.conv2d(h, w, b, groups=6)),
    "conv2d, many positions": ((6, 4, 2, 2), (4, 14, 14), lambda h, w, b: F.conv2d(h, w, b)),
    "conv3d": ((6, 2, 2, 2, 2), (2, 4, 3, 4), lambda h, w, b: F.conv3d(h, w, b, dilation=(2, 1, 1))),
}
"""Weight, sample, function."""


class OneLayer(nn.Module):
    def __init__(self, layer, compute, *, bias=True, follow=torch.tanh):
        super().__init__()
        shape, self.sample, self.function = LAYERS[layer]
        self.name, self.follow = compute, follow
        self.compute = (BY_ROWS | OTHERWISE)[compute]
        self.set(torch.randn(shape) + 0.2, bias)

    def set(self, weight, bias):
        self.weight = nn.Parameter(weight)
        with_gain = self.name in WITH_GAIN or self.name in OTHERWISE_WITH_GAIN
        self.gain = nn.Parameter(torch.rand(len(weight)) + 0.5) if with_gain else None
        self.bias = nn.Parameter(torch.randn(len(weight))) if bias else None
        numbers = NUMBERS.get(self.name, lambda _: torch.rand_like(weight))
        self.register_buffer("numbers", numbers(torch.arange(weight.numel()).view_as(weight)))

    def forward(self, h):
        weight = self.compute(self.weight, self.gain, self.numbers)
        return self.follow(self.function(h, weight, self.bias))

    def batch(self, rows):
        return torch.randn(rows, *self.sample, dtype=self.weight.dtype)


def refuse(self):
    raise AssertionError("gradients were carried over")


@pytest.fixture
def never_carried(monkeypatch):
    monkeypatch.setattr(Carried, "_sq_norms_carried", refuse)


@pytest.mark.usefixtures("never_carried")
@pytest.mark.parametrize("follow", [torch.tanh, torch.Tensor.tanh_], ids=["", "in place"])
@pytest.mark.parametrize("rows_per_sample", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("compute", BY_ROWS)
def test_exact_without_carrying(compute, layer, rows_per_sample, follow):
    torch.manual_seed(3)
    model = OneLayer(layer, compute, bias=rows_per_sample == 1, follow=follow).double()
    assert assert_clipped(model, model.batch(5 * rows_per_sample), clip_per_sample, rows_per_sample) == []


@pytest.mark.usefixtures("never_carried")
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv2d, groups", "conv3d"])
def test_of_written_gradients_and_of_none(layer, keeps, monkeypatch):
    rule = "psgrad.layers.conv.Convolution.keeps_grads"
    monkeypatch.setattr(rule, lambda self, call: keeps)
    model = OneLayer(layer, "standardised by batch_norm").double()
    assert_clipped(model, model.batch(6), clip_per_sample)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("compute", OTHERWISE)
def test_another_form_is_found_out_and_carried(compute, layer, monkeypatch):
    found = []

    def told(value, leaves):
        found.append(row_maps(value, leaves))
        return found[-1]

    monkeypatch.setattr(computed, "row_maps", told)
    torch.manual_seed(0)
    model = OneLayer(layer, compute).double()
    assert_clipped(model, model.batch(5), clip_per_sample)
    assert found
    assert not any(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (8, 3000), (2, 64, 7, 7), (3, 2, 2, 2)])
@pytest.mark.parametrize("compute", [*BY_ROWS, *OTHERWISE])
def test_the_form_is_told_from_others_in_either_precision(compute, shape, dtype):
    torch.manual_seed(0)
    model = OneLayer("linear", compute, bias=False)
    model.set(torch.randn(shape) / 3, bias=False)
    model.to(dtype)
    leaves = {p: p.detach().requires_grad_() for p in model.parameters()}
    value = model.compute(*leaves.values(), *[None] * (2 - len(leaves)), model.numbers)
    assert (row_maps(value, leaves) is not None) == (compute in BY_ROWS)


class Convolutions(nn.Module):
    """Standardised, with a bias, normed, and what is done in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.second = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Parameter(torch.randn(4, 8))

    def forward(self, h):
        h = F.conv2d(h, standardised(self.first), padding=1).relu_()
        h = h + checkpoint(self.second, h, use_reentrant=False)
        return F.linear(h.mean((2, 3)), standardised(self.last))


@pytest.mark.usefixtures("never_carried")
def test_a_network_with_checkpoints_residuals_and_a_memory_budget():
    model = Convolutions().double()
    x = torch.randn(6, 3, 8, 8).double()
    assert_clipped(model, x, clip_per_sample)
    assert_clipped(model, x, clip_per_sample, memory_budget=20_000)
    assert_clipped(model, x.contiguous(memory_format=torch.channels_last), clip_per_sample, style="flat")


class Standardise(nn.Module):
    def forward(self, weight):
        return standardised(weight)


@pytest.mark.usefixtures("never_carried")
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided"])
def test_parametrized_layers_with_any_padding_and_memory_layout(padding_mode, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=padding_mode)
    parametrize.register_parametrization(conv, "weight", Standardise())
    x = torch.randn(5, 4, 7, 12).double()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = x[:, :1].expand(5, 4, 7, 12) if layout == "expanded" else x[..., ::2]
    assert_clipped(nn.Sequential(conv, nn.Tanh()).double(), x, clip_per_sample)


@pytest.mark.parametrize("compute", ["standardised", "masked"])
def test_what_a_layer_returned_is_let_go_of_with_its_norms(compute, monkeypatch):
    monkeypatch.setattr("psgrad.layers.conv.Convolution.keeps_grads", lambda self, call: False)
    held = []
    monkeypatch.setattr(Carried, "weighted_sum", noting_what_is_held(Carried.weighted_sum, held))
    model = OneLayer("conv2d", compute)
    with clip_per_sample(model, 1.0):
        squared_loss(model, model.batch(6)).backward()
    assert held == [None]


def noting_what_is_held(weighted_sum, held):
    def noted(self, factors):
        held.append(self.output.take())
        return weighted_sum(self, factors)

    return noted


def test_float32_is_as_exact_as_of_a_plain_layer():
    torch.manual_seed(0)
    model = Convolutions()
    x = torch.randn(16, 3, 16, 16)
    expected = grads_one_by_one(copy.deepcopy(model).double(), squared_loss, [x.double()])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    with clip_per_sample(model, 1.0) as clip:
        squared_loss(model, x).backward()
        torch.testing.assert_close(clip.result.norms.double(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_gradient_that_is_nearly_all_taken_away_is_computed_again(keeps, monkeypatch):
    """Of a constant image every row of the gradient is constant, and centring leaves nothing of it."""
    monkeypatch.setattr("psgrad.layers.conv.Convolution.keeps_grads", lambda self, call: keeps)
    carried = []
    exact = Carried._sq_norms_carried

    def noted(self):
        carried.append(self.samples)
        return exact(self)

    monkeypatch.setattr(Carried, "_sq_norms_carried", noted)
    torch.manual_seed(0)
    model = OneLayer("conv2d", "centred", bias=False)
    x = torch.randn(6, 4, 6, 5)
    x[2] = 40.0
    x[4] = 40.0 + 1e-2 * x[4]
    # without padding, so that a constant image stays one
    model.function = lambda h, w, b: F.conv2d(h, w)
    expected = grads_one_by_one(copy.deepcopy(model).double(), squared_loss, [x.double()])["weight"]
    norms = expected.flatten(1).norm(dim=1)
    with clip_per_sample(model, 1.0) as clip:
        squared_loss(model, x).backward()
        found = clip.result.norms.double()
    assert carried == [2]
    assert norms[4] > 0
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], norms[[0, 1, 3, 4, 5]], rtol=1e-4, atol=0)
    assert found[2] < 1e-4 * norms[0]


class GainForBias(OneLayer):
    def __init__(self, times):
        super().__init__("linear", "normed", bias=False)
        self.times = times

    def forward(self, h):
        bias = self.gain if self.times == 1 else self.times * self.gain
        return F.linear(h, normed(self.weight, self.gain, None), bias)


@pytest.mark.parametrize("times", [1, 2])
def test_a_parameter_that_the_bias_has_too(times):
    model = GainForBias(times).double()
    assert_clipped(model, model.batch(12), clip_per_sample, 2)


def test_samples_of_several_rows_are_computed_again():
    torch.manual_seed(0)
    model = OneLayer("linear, vectors", "centred").double()
    x = model.batch(12)
    x[4:6] = 3 + 1e-5 * x[4:6]
    assert_clipped(model, x, clip_per_sample, 2)


def test_written_gradients_in_any_memory_order():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 4, 3, 2).double())
    leaf = p.detach().requires_grad_()
    maps = row_maps(standardised(leaf), {p: leaf})
    grads = torch.randn(6, 5, 4, 3, 2).double()
    expected = maps.sq_norms_of(grads)[p]
    for order in itertools.permutations(range(5)):
        back = [order.index(axis) for axis in range(5)]
        torch.testing.assert_close(
            maps.sq_norms_of(grads.permute(order).contiguous().permute(back))[p], expected
        )


def test_a_row_that_is_nearly_constant_is_not_told_by_its_own_products():
    p = nn.Parameter(torch.randn(5, 30))
    leaf = p.detach().requires_grad_()
    assert row_maps(leaf + 0.5, {p: leaf}) is not None
    assert row_maps(leaf + 15, {p: leaf}) is None


def test_norms_of_outputs_in_half_precision_are_carried(monkeypatch):
    def never(*_):
        raise AssertionError("asked for")

    monkeypatch.setattr(computed, "row_maps", never)
    model = OneLayer("conv2d", "standardised")
    with clip_per_sample(model, 1.0) as clip:
        with torch.autocast("cpu", torch.bfloat16):
            loss = squared_loss(model, model.batch(6))
        loss.backward()
        assert clip.result.norms.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_leaves_the_others_alone(bad):
    torch.manual_seed(0)
    model = OneLayer("conv2d", "standardised").double()
    x = model.batch(6)
    good = grads_one_by_one(model, squared_loss, [x])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in good.values()]).sum(0).sqrt()
    x[1, 0, 0, 0] = bad
    with clip_per_sample(model, 0.1, "sum") as clip:
        (squared_loss(model, x) * 6).backward()
        rest = [0, 2, 3, 4, 5]
        torch.testing.assert_close(clip.result.norms[rest], norms[rest])
        assert not clip.result.norms[1].isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_nobody_elses_random_numbers_are_used():
    model = OneLayer("conv2d", "standardised")
    x = model.batch(6)
    with clip_per_sample(model, 0.1):
        loss = squared_loss(model, x)
        before = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_were_drawn_with_any_seed_are_told_apart_from_the_probes():
    for seed in (0, 1, 42, 1234):
        torch.manual_seed(seed)
        p = nn.Parameter(torch.randn(8, 16))
        leaf = p.detach().requires_grad_()
        assert row_maps(centred(leaf), {p: leaf}) is not None


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(2, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(4, 7),
    st.booleans(),
    st.sampled_from(sorted(BY_ROWS.keys() - {"every other row"})),
)
def test_random_problems(outputs, inputs, kernel, groups, padding, samples, bias, compute):
    torch.manual_seed(outputs + 7 * inputs)
    model = OneLayer("conv2d", compute)
    model.set(torch.randn(groups * outputs, inputs, kernel, kernel + 1), bias)
    model.function = lambda h, w, b: F.conv2d(h, w, b, padding=padding, groups=groups)
    x = torch.randn(samples, groups * inputs, 5, 6).double()
    assert_clipped(model.double(), x, clip_per_sample)
