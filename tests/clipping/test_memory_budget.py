"""Clipping within a memory budget: the same clipped sum, in the bytes that were given, or an error."""

import gc
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from psgrad import ConfigError, clip_per_sample
from psgrad.clipping import STYLES
from psgrad.conv import ConvGeometry, clipping_keeps_grads
from psgrad.ensemble import Ensemble
from tests.capture.test_capture import MODELS, make
from tests.clipping.test_styles import CASES, Net, oracle
from tests.model_oracle import grads_one_by_one, squared_loss

LEAST = 1
"""A budget in which nothing can be held."""

USED_TWICE = {"layers called twice": 20_000, "tied weights": 20_000}
"""Models whose parameters are used several times, and bytes that are enough."""


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def clipped(model, loss_of, budget, reduction="mean", **settings):
    """The gradients that clipping leaves and its result, of the second of two equal backward passes."""
    with clip_per_sample(model, 0.3, reduction, memory_budget=budget, **settings) as clip:
        for _ in range(2):  # in the first it is found out what does not fit
            model.zero_grad()
            loss_of(model).backward()
    return grads_of(model), clip.result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clipped_sum_of_every_style_and_model(name, style, reduction):
    model, x = make(name)
    expected = oracle(CASES[style], grads_one_by_one(model, squared_loss, [x]))
    scale = 1 if reduction == "mean" else len(x)
    with clip_per_sample(model, CASES[style], reduction, memory_budget=USED_TWICE.get(name, LEAST)) as clip:
        for _ in range(2):
            model.zero_grad()
            (squared_loss(model, x) * scale).backward()
            divisor = len(x) if reduction == "mean" else 1
            assert_same({n: g * divisor for n, g in grads_of(model).items()}, expected)
    assert clip.result.passes == (1 if name in USED_TWICE else 2)


@pytest.mark.parametrize("rows_per_sample", [2, 3])
@pytest.mark.parametrize("name", ["in-place residual", "nested", "parametrized"])
def test_samples_of_several_rows(name, rows_per_sample):
    model, x = make(name)
    results = [
        clipped(model, lambda m: squared_loss(m, x), budget, rows_per_sample=rows_per_sample)
        for budget in (None, LEAST)
    ]
    (held, one), (again, two) = results
    assert_same(again, held)
    torch.testing.assert_close(two.norms, one.norms)
    assert (one.passes, two.passes) == (1, 2)


class Part(Net):
    """The network of the style tests without the layer that is called twice."""

    def forward(self, x):
        x = F.relu_(self.norm(self.conv(x)))
        return self.head((x + self.again(x)).mean((2, 3)))


def clipped_sum(model, batch, parts, reduction):
    """The clipped sum, float64, of physical batches."""
    total = 0
    for x, y in zip(*(t.split(parts) for t in batch), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y, reduction=reduction).backward()
        flat = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        total = total + flat * (len(x) if reduction == "mean" else 1)
    return total


@settings(max_examples=50)
@given(
    style=st.sampled_from(list(STYLES)),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    samples=st.integers(2, 6),
    parts=st.integers(1, 6),
    budget=st.sampled_from([1, 3_000, 20_000, 10**9]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    removed=st.integers(0, 5),
    poison=st.sampled_from([None, float("nan"), float("inf")]),
)
def test_p1_p2_one_sample_changes_the_sum_by_at_most_the_bound(
    style, reduction, dtype, samples, parts, budget, scale, removed, poison
):
    torch.manual_seed(0)
    model = Part().to(dtype)
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=dtype) * scale
    y = torch.randint(3, (samples,), generator=generator)
    gone = removed % samples
    if poison is not None:
        x[gone, 0, 0, 0] = poison
    keep = torch.arange(samples) != gone
    with clip_per_sample(model, CASES[style], reduction, memory_budget=budget) as clip:
        with_it = clipped_sum(model, (x, y), parts, reduction)
        non_finite = clip.gathered.non_finite.item()
        without = clipped_sum(model, (x[keep], y[keep]), parts, reduction)
        assert clip.result.passes >= 2 or budget > 1
    allowed = 0.0 if poison is not None else clip.l2_bound
    assert with_it.isfinite().all()
    assert (with_it - without).norm() <= allowed + 1e-5 * (clip.l2_bound + with_it.norm())
    assert non_finite == (poison is not None)


def peak_bytes(run):
    """The most that PyTorch had allocated on the CPU at once, above what there was."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in sorted((e.start_ns(), e.nbytes()) for e in events)))


MIB = 2**20


@pytest.mark.parametrize("budget", [None, LEAST, 5 * MIB, 9 * MIB, 100 * MIB])
def test_peak_memory_is_that_of_ordinary_training_and_the_budget(budget):
    torch.manual_seed(0)
    width, rows, layers = 256, 1024, 12
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))
    x = torch.randn(rows, width)
    of_a_layer = 4 * rows * width  # bytes: an input, an output's gradient

    def step():
        model(x).square().sum().backward()
        model.zero_grad()

    step()
    ordinary = peak_bytes(step)
    assert ordinary >= layers * of_a_layer
    with clip_per_sample(model, 1.0, "sum", memory_budget=budget) as clip:
        step()
        step()
        more = peak_bytes(step) - ordinary
        passes = clip.result.passes
    if budget is None:
        assert more > 8 * MIB  # there is something to save
    else:
        assert passes == (1 if budget > 90 * MIB else 2)
        held = min(budget, 2 * layers * of_a_layer)
        # one layer's: the output's gradient, the same once more scaled, the input's, and one of torch's
        assert more <= held + 4 * of_a_layer
        assert budget > 9 * MIB or more <= 4 * of_a_layer


def test_within_a_budget_the_form_that_takes_less_is_held_not_the_faster_one():
    model, x = nn.Conv2d(16, 16, 3, padding=1, bias=False), torch.randn(64, 16, 6, 6)
    operands, gradients = 2 * x.nbytes, 64 * model.weight.nbytes
    assert 2 * operands <= gradients
    geometry = ConvGeometry(3, padding=1)
    assert clipping_keeps_grads(x, x, model.weight.shape, geometry)  # where nobody minds the memory
    with clip_per_sample(model, 0.1, "sum", memory_budget=operands + 1000) as clip:
        model(x).square().sum().backward()
    assert clip.result.passes == 1


class Deep(nn.Module):
    """Many parameters below much that is saved for backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3000, 3000)

    def forward(self, x):
        x = self.layer(x).repeat(1, 200)
        for _ in range(4):
            x = x.tanh()
        return x


@pytest.mark.parametrize(("budget", "passes"), [(LEAST, 2), (MIB, 1)])
def test_what_forward_saved_goes_before_the_clipped_sums_come(budget, passes):
    model, x = Deep(), torch.randn(4, 3000)
    saved, gradient = 4 * 4 * x.numel() * 200, 4 * 3000 * 3000

    def step():
        model(x).square().sum().backward()
        model.zero_grad()

    step()
    with clip_per_sample(model, 1.0, "sum", memory_budget=budget) as clip:
        step()
        step()
        peak = peak_bytes(step)
    assert clip.result.passes == passes
    assert min(saved, gradient) > 30 * MIB
    assert peak < saved + gradient - 5 * MIB


def test_a_larger_batch_than_fits_is_found_out_again_and_a_smaller_one_is_held():
    model, x = make("in-place residual")
    with clip_per_sample(model, 0.3, memory_budget=14_000) as clip:

        def passes(rows):
            squared_loss(model, x[:rows]).backward()
            return clip.result.passes

        assert passes(1) == 1
        assert [passes(6), passes(6), passes(4)] == [3, 2, 3]
        assert [passes(5), passes(1), passes(4)] == [2, 1, 2]


@pytest.mark.parametrize("budget", [LEAST, 200, MIB])
def test_a_pass_that_failed_leaves_nothing_for_the_next(budget):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double(), torch.randn(6, 4).double()
    expected = oracle(CASES["flat"], grads_one_by_one(model, squared_loss, [x]))

    def fail(*_):
        raise ZeroDivisionError

    with clip_per_sample(model, 0.3, memory_budget=budget):
        for _ in range(2):
            failing = model[1].register_full_backward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                squared_loss(model, x).backward()
            failing.remove()
            model.zero_grad()
            squared_loss(model, x).backward()
            assert_same({n: 6 * g for n, g in grads_of(model).items()}, expected)


class PartlyTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(4, 50)
        self.twice = nn.Linear(50, 50)
        self.head = nn.Linear(50, 3)
        self.calls = 2

    def forward(self, x):
        x = self.wide(x)
        for _ in range(self.calls):
            x = self.twice(torch.tanh(x))
        return self.head(x)


def test_a_parameter_that_is_used_twice_is_held_beside_what_comes_again():
    torch.manual_seed(0)
    model, x = PartlyTwice().double(), torch.randn(6, 4, dtype=torch.double)
    expected = oracle(CASES["flat"], grads_one_by_one(model, squared_loss, [x]))
    enough = 4 * 6 * 50 * 8 + 100  # both inputs and both gradients
    with clip_per_sample(model, 0.3, memory_budget=enough) as clip:
        for passes in (3, 2, 2):
            model.zero_grad()
            squared_loss(model, x).backward()
            assert_same({n: 6 * g for n, g in grads_of(model).items()}, expected)
            assert clip.result.passes == passes
    with (
        clip_per_sample(model, 0.3, memory_budget=enough // 2),
        pytest.raises(ConfigError, match=r"9,\d{3} bytes|of 'twice' are used several times"),
    ):
        squared_loss(model, x).backward()


def test_a_parameter_whose_second_use_comes_when_others_are_let_go_of_has_the_norm_of_the_sum():
    torch.manual_seed(0)
    model, x = PartlyTwice().double(), torch.randn(6, 4, dtype=torch.double)
    with clip_per_sample(model, 0.3, memory_budget=4 * 6 * 50 * 8 + 100) as clip:
        for calls, passes in ((1, 3), (1, 2), (2, 3), (2, 2)):
            model.calls = calls
            expected = oracle(CASES["flat"], grads_one_by_one(model, squared_loss, [x]))
            model.zero_grad()
            squared_loss(model, x).backward()
            assert_same({n: 6 * g for n, g in grads_of(model).items()}, expected)
            assert clip.result.passes == passes


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, float("nan"), float("inf"), "1 GiB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(wrong):
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"memory_budget=.*: give a positive int, in bytes"):
        clip_per_sample(model, 1.0, memory_budget=wrong)
    clip_per_sample(model, 1.0, memory_budget=1).remove()  # nothing was attached


def test_an_ensemble_has_no_budget():
    ensemble = Ensemble.from_factory(lambda: nn.Linear(2, 2), seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"memory_budget is for one model, and Ensemble is several"):
        clip_per_sample(ensemble, 1.0, memory_budget=10**6)
