"""Layers by function, with weights as they are or computed: `F.conv2d(x, standardised(self.weight))`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import PerSampleGrads, RefusedModelError, clip_per_sample
from psgrad.capture import LayerUse, computed
from psgrad.capture.functions import FORMULAS, FUNCTIONS
from tests.capture.function_models import (
    ALL,
    AS_THEY_ARE,
    COMPUTED,
    FROM_OTHERS,
    IMAGES,
    WEIGHTS,
    ByFunction,
    model_of,
    shape_of,
    shapes,
    standardised,
)
from tests.capture.unknown import product
from tests.model_oracle import assert_clipped, assert_written_out, grads_one_by_one, squared_loss


def test_every_function_has_a_case():
    assert {case[0] for case in AS_THEY_ARE.values()} == set(FUNCTIONS)
    assert {case[0] for case in FROM_OTHERS.values()} == set(FORMULAS)


# of as many rows, or samples, as there are channels too
@pytest.mark.parametrize(("rows", "rows_per_sample"), [(4, 1), (5, 1), (8, 2)])
@pytest.mark.parametrize("name", ALL)
def test_exact_and_as_a_whole(name, rows, rows_per_sample):
    model, batch = model_of(name)
    x = batch(rows)
    expected = model(x)
    with PerSampleGrads(model, rows_per_sample=rows_per_sample) as handle:
        torch.testing.assert_close(model(x), expected)
        assert handle.regions == {}
    assert assert_clipped(model, x, clip_per_sample, rows_per_sample) == []


@pytest.mark.parametrize("name", ALL)
def test_gradients_written_out_and_an_empty_batch(name):
    assert_written_out(*model_of(name))


class OneByOne(nn.Module):
    """Adds a parameter along the batch, so that it runs one sample at a time with all that is inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.table = nn.Parameter(torch.randn(2, 2).double())

    def forward(self, x):
        out = self.inner(x)
        return out + product(out.flatten(1)[:, :2], self.table).mean(1).reshape(-1, *(1,) * (out.ndim - 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ALL)
def test_inside_of_what_runs_one_sample_at_a_time(name):
    model, batch = model_of(name)
    around = OneByOne(model)
    if name == "with its norm as a number":  # of which vmap has none for every sample
        with PerSampleGrads(around), pytest.raises(RefusedModelError, match=r"vmap could not"):
            around(batch(3))
    else:
        assert assert_clipped(around, batch(3), clip_per_sample) == [""]


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in ALL if shape_of(name) == IMAGES])
def test_any_memory_layout_and_a_sample_alone(name, layout, rows):
    model, batch = model_of(name)
    assert assert_clipped(model, LAYOUTS[layout](batch(rows)), clip_per_sample) == []


@pytest.mark.parametrize("rows_per_sample", [1, 3])
@pytest.mark.parametrize("name", COMPUTED)
def test_norms_of_a_few_samples_at_a_time(name, rows_per_sample, monkeypatch):
    monkeypatch.setattr(computed, "CHUNK_BYTES", 1)
    for kind in (LayerUse, computed.Carried):  # nothing is written out
        monkeypatch.setattr(kind, "kept", lambda self: self)
    model, batch = model_of(name)
    assert assert_clipped(model, batch(9), clip_per_sample, rows_per_sample) == []


def test_a_weight_that_is_only_cast_is_as_it_is():
    model = ByFunction(
        lambda self, h: F.linear(h, self.weight.to(h.dtype).contiguous()), shapes(3, 4)
    ).double()
    with PerSampleGrads(model) as handle:
        kinds, add = [], handle.add
        handle.add = lambda c: (kinds.append(type(c)), add(c))
        squared_loss(model, torch.randn(3, 4).double()).backward()
        assert handle.regions == {}
    assert kinds == [LayerUse]


MIXED = {
    "batch norm": lambda self, h: F.batch_norm(h, self.mean, self.variance, self.weight, self.bias, True),
    "a weight that is a sample": lambda self, h: F.linear(h, h[0, :, 0], self.bias),
    "a bias that is a sample": lambda self, h: F.linear(h, self.weight.diag(), h.detach()[0, 0, 0]),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_is_refused(name):
    model = ByFunction(MIXED[name], shapes(4, bias=4)).double()
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"mixes|vmap"):
        model(torch.randn(3, 4, 4, 4).double())


def test_an_embedding_that_counts_words_over_the_batch_runs_one_sample_at_a_time():
    def counted(self, h):
        return F.embedding(h.argsort(-1) % 2, self.weight, scale_grad_by_freq=True) * h.mean(1)[:, None, None]

    model = ByFunction(counted, shapes(4, 3)).double()
    assert assert_clipped(model, torch.randn(3, 4).double(), clip_per_sample) == [""]


def test_noise_in_the_weights_is_the_batchs():
    """As without psgrad: drawn once, so that the samples' gradients add up to the ordinary one."""
    torch.manual_seed(0)

    def noisy(self, h):
        return F.conv2d(h, self.weight + self.bias.exp().view(-1, 1, 1, 1) * torch.randn_like(self.weight))

    model = ByFunction(noisy, WEIGHTS).double()
    plain, x = copy.deepcopy(model), torch.randn(3, *IMAGES).double()
    with PerSampleGrads(model) as handle:
        squared_loss(model, x).backward()  # the trials of the first batch draw as well
        model.zero_grad()
        torch.manual_seed(1)
        squared_loss(model, x).backward()
        assert handle.regions == {}
    torch.manual_seed(1)
    squared_loss(plain, x).backward()
    for p, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad)
        torch.testing.assert_close(p.grad_sample.mean(0), other.grad)


def test_frozen_parts():
    model, batch = model_of("standardised as timm does")
    model[2].weight.requires_grad_(False)
    assert assert_clipped(model, batch(3), clip_per_sample) == []


@pytest.mark.parametrize("how", ["function", "parametrized"])
def test_in_a_checkpoint_nothing_is_run_more_often(how):
    calls = []

    def weight_of(weight):
        calls.append(1)
        return standardised(weight)

    class Weight(nn.Module):
        def forward(self, weight):
            return weight_of(weight)

    def use(self, h):
        return F.conv2d(h, weight_of(self.weight), self.bias)

    torch.manual_seed(0)
    conv = ByFunction(use, WEIGHTS)
    if how == "parametrized":
        conv = nn.Conv2d(4, 6, 3)
        nn.utils.parametrize.register_parametrization(conv, "weight", Weight())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), conv, nn.Tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model, x = Outer().double(), torch.randn(3, *IMAGES).double()
    assert assert_clipped(model, x, clip_per_sample) == []
    with clip_per_sample(model, 1.0):
        squared_loss(model, x).backward()
        calls.clear()
        squared_loss(model, x).backward()
    assert len(calls) == 2  # forward, and again in backward


def test_a_step_between_forward_and_backward_is_no_silent_error():
    model, batch = model_of("low rank")
    with PerSampleGrads(model):
        loss = squared_loss(model, batch(3))
        with torch.no_grad():
            model[2].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
            loss.backward()


def test_a_constant_that_is_written_to_before_the_samples_meet_it():
    def use(self, h):
        scale = self.weight * self.mean
        self.mean.mul_(2)
        out = h * scale
        self.mean.div_(2)
        return out

    model, x = ByFunction(use, shapes(4)).double(), torch.randn(3, 4).double()
    expected = model(x)
    with PerSampleGrads(model) as handle:
        torch.testing.assert_close(model(x), expected)
        assert list(handle.regions) == [""]


def test_a_memory_budget_runs_backward_twice_through_computed_weights():
    model, batch = model_of("standardised")
    x = batch(16)
    assert assert_clipped(model, x, clip_per_sample, memory_budget=2**13) == []


def test_half_precision():
    model, batch = model_of("standardised")
    model, x = model.float(), batch(3).float()
    with PerSampleGrads(model), torch.autocast("cpu", torch.bfloat16):
        squared_loss(model, x).backward()
    weight = model[2].weight
    assert weight.grad_sample.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(weight.grad_sample.mean(0), weight.grad)
    expected = grads_one_by_one(model, squared_loss, [x])["2.weight"]
    torch.testing.assert_close(weight.grad_sample, expected, rtol=0.1, atol=0.05)


class Standardised(nn.Conv2d):
    """A layer of one's own, derived from torch's, as weight standardisation is mostly written."""

    def forward(self, x):
        return self._conv_forward(x, standardised(self.weight), self.bias)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_subclasses_with_a_forward_of_their_own(mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        Standardised(4, 6, 3, padding=1, padding_mode=mode),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        Standardised(6, 3, 3),
    )
    assert assert_clipped(model.double(), torch.randn(3, *IMAGES).double(), clip_per_sample) == []


WORDS = torch.arange(20).reshape(4, 5) * 7 % 9
LAYERS = {
    "bags": (lambda: nn.EmbeddingBag(9, 3), WORDS),
    "bags, the largest": (lambda: nn.EmbeddingBag(9, 3, mode="max", padding_idx=0), WORDS),
    "bags, the sum": (lambda: nn.EmbeddingBag(9, 3, mode="sum", padding_idx=1), WORDS),
    "slopes": (lambda: nn.PReLU(3), torch.linspace(-1, 1, 60).reshape(4, 3, 5).double()),
    "slopes of vectors": (lambda: nn.PReLU(3), torch.linspace(-1, 1, 12).reshape(4, 3).double()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_a_rule_of_their_own(name):
    torch.manual_seed(0)
    make, x = LAYERS[name]
    layer = make()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(15 if name == "slopes" else 3, 2))
    assert assert_clipped(model.double(), x, clip_per_sample) == []


def test_bags_by_offsets_are_refused_with_a_way_out():
    class Classifies(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(9, 3), nn.Linear(3, 2)

        def forward(self, words, offsets):
            return self.head(self.bag(words, offsets))

    model = Classifies()
    with (
        PerSampleGrads(model),
        pytest.raises(RefusedModelError, match=r"^bag \(EmbeddingBag\) .*padding_idx"),
    ):
        model(torch.randint(9, (7,)), torch.tensor([0, 2, 4]))
