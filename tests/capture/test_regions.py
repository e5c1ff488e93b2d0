"""Regions: what runs one sample at a time, whatever it does with its parameters and rows, is exact."""

import re

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from psgrad import CaptureError, PerSampleGrads, RefusedModelError, clip_per_sample
from tests.capture.region_models import MODELS, NOT_EMPTY, FromTable, make
from tests.capture.unknown import product
from tests.model_oracle import grads_one_by_one, squared_loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_per_sample", [1, 3])
def test_every_parameter_of_every_model(name, rows_per_sample):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    plain = squared_loss(model, x)
    with PerSampleGrads(model, rows_per_sample=rows_per_sample):
        loss = squared_loss(model, x)
        loss.backward()
    torch.testing.assert_close(loss, plain)
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path], msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", ["sequence first", "self-attention", "cross-attention", "frames first"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_as_many_samples_as_there_are_steps(name, rows):
    """An axis of time as long as the batch is not the batch, nor is a mask's."""
    model, x = make(name, rows)
    x = torch.randn(rows, rows, *x.shape[2:], dtype=torch.double)
    expected = grads_one_by_one(model, squared_loss, [x])
    plain = squared_loss(model, x)
    with PerSampleGrads(model):
        loss = squared_loss(model, x)
        loss.backward()
    torch.testing.assert_close(loss, plain)
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path], msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_clipped_sum_of_every_model(name):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x])
    norms = torch.stack([g.reshape(len(x), -1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    factors = (norms.median() / norms).clamp(max=1)
    with clip_per_sample(model, norms.median().item(), "sum") as clip:
        (squared_loss(model, x) * len(x)).backward()
    torch.testing.assert_close(clip.result.norms, norms)
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad, torch.tensordot(factors, expected[path], 1))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_EMPTY])
def test_empty_batch(name):
    model, x = make(name)
    with PerSampleGrads(model, "sum"):
        squared_loss(model, x).backward()  # which modules are regions is known from here on
        model.zero_grad()
        model(x[:0]).sum().backward()
    assert all(p.grad_sample.shape == (0, *p.shape) for p in model.parameters())
    assert not any(p.grad.any() for p in model.parameters())


def test_children_of_an_owner_keep_their_rules():
    model, _ = make("children's weights")
    with PerSampleGrads(model) as handle:
        kinds = {}
        add = handle.add
        handle.add = lambda c: (kinds.setdefault(c.path, set()).add(type(c).__name__), add(c))
        squared_loss(model, torch.randn(4, 5, 3, dtype=torch.double)).backward()
    assert kinds == {
        "": {"KeptGrads"},
        "a": {"LayerUse"},
        "b": {"LayerUse", "KeptGrads"},
        "c": {"LayerUse", "KeptGrads"},
    }


def test_layer_norm_by_function_keeps_its_rule():
    model, x = make("norms by function")
    with PerSampleGrads(model) as handle:
        kinds = []
        add = handle.add
        handle.add = lambda c: (kinds.append((c.path, type(c).__name__)), add(c))
        squared_loss(model, x).backward()
    # the region's own: both layer norms' computed parameters
    assert ("norm", "LayerUse") in kinds
    assert ("norm", "KeptGrads") not in kinds
    assert sorted(kind for path, kind in kinds if not path) == ["KeptGrads"] * 3 + ["LayerUse"]


def test_only_the_module_around_other_rows_becomes_a_region():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(3, 3)
            self.blocks = nn.ModuleList([FromTable(), FromTable()])

        def forward(self, x):
            return self.blocks[1](self.stem(x) + self.blocks[0](x)[:, None])

    model = Deep().double()
    x = torch.randn(4, 5, 3, dtype=torch.double)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model) as handle:
        squared_loss(model, x).backward()
        assert "blocks.0" in handle.regions
        assert "" not in handle.regions
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path])
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "regions"),
    [
        ("a table by a method", {"a", "b"}),
        ("windows and a query", {"block"}),
        ("windows, broadcast", {"block"}),
        ("tied by function", {""}),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_what_the_first_batch_tells_of_regions(name, regions, rows):
    model, x = make(name, rows)
    with PerSampleGrads(model) as handle:
        squared_loss(model, x).backward()
        assert set(handle.regions) == regions


@pytest.mark.parametrize(
    ("name", "path", "why"),
    [
        ("tied by function", "", "^einsum of more than a parameter and the batch$"),
        ("frames", "", r"^conv \(Conv2d\): called with \d+ rows"),
        ("bias from a table", "", r"^bias \(Sequential\): no input has the batch's"),
        ("windows and a query", "block", r"^block.attention \(Attention\): returns "),
    ],
)
def test_why_a_module_runs_one_sample_at_a_time(name, path, why):
    model, x = make(name)
    with PerSampleGrads(model) as handle:
        assert set(handle.regions.values()) <= {"no batch has told yet"}
        squared_loss(model, x).backward()
        assert re.search(why, handle.regions[path])


class Scaled(nn.Module):
    """Uses its parameter in a way that is known, or as `other` does where there is one."""

    def __init__(self, other):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.other = other

    def forward(self, x):
        return x * self.scale if self.other is None else self.other(x, self.scale)


def test_why_is_told_of_errors_that_are_not_of_psgrad_too():
    def other(x, scale):
        if type(scale).__name__ == "StandIn":
            raise AttributeError("no  such\nthing")
        return x * scale

    model = nn.Sequential(Scaled(other))
    with PerSampleGrads(model) as handle:
        model(torch.randn(4, 3))
        assert handle.regions == {"0": "AttributeError: no such thing"}


def test_why_is_told_of_what_only_a_later_batch_does():
    model = nn.Sequential(Scaled(None), nn.Linear(3, 2))
    with PerSampleGrads(model) as handle:
        model(torch.randn(4, 3))
        assert handle.regions == {}
        model[0].other = lambda x, scale: product(x, scale)[:, None].expand(-1, 3)
        model(torch.randn(4, 3))
        assert handle.regions == {"0": "einsum of more than a parameter and the batch"}


class WithParameters(nn.Module):
    """Returns what is made of parameters alone beside its output: for a center loss, or a penalty."""

    def __init__(self, made):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.centers = nn.Parameter(torch.randn(2, 4))
        self.made = made

    def forward(self, x):
        return self.linear(x), self.made(self.centers)


@pytest.mark.parametrize("made", [lambda c: c, lambda c: c.square().sum(0)])
def test_a_loss_of_a_parameter_that_the_model_returns_is_refused(made):
    model = WithParameters(made)
    with PerSampleGrads(model):
        out, returned = model(torch.randn(5, 3))
        with pytest.raises(CaptureError, match=r"a result \(.*4,?\) of the model"):
            (out.square().mean() + returned.sum()).backward()
        model(torch.randn(5, 3))[0].square().mean().backward()
        assert model.linear.weight.grad_sample.shape == (5, 4, 3)


def test_a_number_that_the_model_returns_is_refused():
    model = WithParameters(torch.sum)
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match="returns a number"):
        model(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda model, x: model(x), "einsum of more"),
        (lambda model, x: model[0](x), "the trials of the first"),
    ],
)
def test_what_vmap_cannot_run_is_refused_by_name_with_a_way_out(call, why):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return product(x, self.scale) * x.sum().item()

    model = nn.Sequential(Counts())
    says = rf"0 \(Counts\)(?s:.*)because: {why}(?s:.*)layers that have a rule"
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=says):
        call(model, torch.randn(2, 3))


def test_stochastic_depth_in_a_region_draws_for_every_sample():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.drop = StochasticDepth(0.5, "row")

        def forward(self, x):
            return self.drop(x * self.scale)

    model = Scaled()
    x = torch.ones(200, 2)
    with PerSampleGrads(model, "sum"):
        model(x).sum().backward()
    drawn = model.scale.grad_sample
    assert set(drawn.unique().tolist()) == {0.0, 2.0}
    assert (drawn[:, 0] == drawn[:, 1]).all()
