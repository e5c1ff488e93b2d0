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
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, ConfigError, clip_per_sample
from psgrad.capture.repeatable import RepeatableCall
from psgrad.clipping import STYLES
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


def test_a_larger_batch_than_fits_is_found_out_again_and_a_smaller_one_is_held():
    model, x = make("in-place residual")
    with clip_per_sample(model, 0.3, memory_budget=14_000) as clip:

        def passes(rows):
            squared_loss(model, x[:rows]).backward()
            return clip.result.passes

        assert passes(1) == 1
        assert [passes(6), passes(6), passes(4)] == [3, 2, 3]
        assert [passes(5), passes(1), passes(4)] == [2, 1, 2]


class PartlyTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(4, 50)
        self.twice = nn.Linear(50, 50)
        self.head = nn.Linear(50, 3)

    def forward(self, x):
        return self.head(self.twice(torch.tanh(self.twice(torch.tanh(self.wide(x))))))


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


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        x = self.body(x).tanh()
        return {"left": self.left(x), "both": [self.right(x), x.detach(), "text"], "features": x}


def test_every_output_of_a_nested_result_may_reach_the_loss():
    torch.manual_seed(0)
    model, x = TwoOutputs().double(), torch.randn(6, 4, dtype=torch.double)

    def loss(model):
        out = model(x)
        assert out["both"][2] == "text"
        assert not out["both"][1].requires_grad
        return out["left"].square().mean() + out["both"][0].sin().mean() + out["features"].square().mean()

    one, two = (clipped(model, loss, budget)[0] for budget in (None, LEAST))
    assert_same(two, one)
    one, two = (clipped(model, lambda m: m(x)["left"].mean(), budget)[0] for budget in (None, LEAST))
    assert_same(two, one)  # one of the outputs is left out: so are the right layer's parameters
    assert "right.weight" not in two


def test_outputs_may_be_written_to():
    model, x = make("in-place residual")
    one, two = (clipped(model, lambda m: F.relu_(m(x)).sum(), budget)[0] for budget in (None, LEAST))
    assert_same(two, one)
    model, x = TwoOutputs(), torch.randn(6, 4)

    def loss(model):
        out = model(x)
        out["both"][0] += out["left"].mul_(2)[:, :2]
        return out["both"][0].square().mean()

    one, two = (clipped(model, loss, budget)[0] for budget in (None, LEAST))
    assert_same(two, one)


class Calls(nn.Module):
    """Something to train before the module that is clipped, and the module called on what it returned."""

    def __init__(self, inner):
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.inner = inner

    def forward(self, x):
        x = self.before(x)
        return self.inner(torch.tanh(self.inner(x))) + x + self.inner(x[:, [1, 0, 2, 3]])


@pytest.mark.parametrize("budget", [LEAST, 10**4, 10**9])
def test_several_calls_on_each_others_results_and_inputs_that_require_grad(budget):
    torch.manual_seed(0)
    model = Calls(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))).double()
    x = torch.randn(6, 4, dtype=torch.double)

    def run(budget):
        model.zero_grad()
        with clip_per_sample(model.inner, 0.3, memory_budget=budget) as clip:
            model(x).square().mean().backward()
        return grads_of(model), clip.result

    if budget == LEAST:  # three uses of everything cannot be let go of
        with pytest.raises(ConfigError, match="several times"):
            run(budget)
        return
    (one, _), (two, result) = run(None), run(budget)
    assert_same(two, one)
    assert result.passes == 1


def test_an_input_that_requires_grad_gets_the_ordinary_gradient_once():
    model, x = make("in-place residual")
    ordinary = torch.autograd.grad(squared_loss(model, x.requires_grad_()), x)[0]
    with clip_per_sample(model, 0.3, memory_budget=LEAST) as clip:
        squared_loss(model, x).backward()
    torch.testing.assert_close(x.grad, ordinary)
    assert clip.result.passes == 3


class Prompted(nn.Module):
    """Uses a tensor that is trained elsewhere and is no parameter of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.prompt = [torch.randn(4, dtype=torch.double, requires_grad=True)]

    def forward(self, x):
        return self.layer(x + self.prompt[0].exp())


def test_a_leaf_that_is_no_parameter_gets_its_gradient_once():
    torch.manual_seed(0)
    model, x = Prompted().double(), torch.randn(6, 4, dtype=torch.double)
    (prompt,) = model.prompt
    ordinary = torch.autograd.grad(squared_loss(model, x), prompt)[0]
    with clip_per_sample(model, 0.3, memory_budget=LEAST) as clip:
        squared_loss(model, x).backward()
    torch.testing.assert_close(prompt.grad, ordinary)
    assert clip.result.passes == 3


def test_activation_checkpointing_inside_and_around():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 4))
    model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 3)).double()
    x = torch.randn(6, 4, dtype=torch.double)

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model[2](checkpoint(self.model[1], self.model[0](x), use_reentrant=False))

    def loss(out):
        return out.square().mean()

    for whole, run in (
        (Inside(), lambda m: m(x)),
        (model, lambda m: checkpoint(m, x, use_reentrant=False)),
    ):
        seen = []
        for budget in (None, LEAST):
            torch.manual_seed(1)
            with clip_per_sample(whole, 0.3, memory_budget=budget) as clip:
                loss(run(whole)).backward()
                whole.zero_grad()
                torch.manual_seed(2)
                loss(run(whole)).backward()
            seen.append(grads_of(whole))
        assert_same(seen[1], seen[0])
        assert clip.result.passes == 2


def test_dropout_is_the_same_in_both_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 50), nn.Dropout(0.5)).double()
    x = torch.randn(6, 4, dtype=torch.double)
    seen = []
    for budget in (None, LEAST):
        with clip_per_sample(model, 0.3, memory_budget=budget) as clip:
            model(x).square().mean().backward()
            model.zero_grad()
            torch.manual_seed(1)
            model(x).square().mean().backward()
        seen.append(grads_of(model))
    assert clip.result.passes == 2
    assert_same(seen[1], seen[0])


def test_frozen_parts_and_autocast():
    model, x = make("in-place residual")
    model.conv1.requires_grad_(False)
    model.norm2.requires_grad_(False)
    one, two = (clipped(model, lambda m: squared_loss(m, x), budget)[0] for budget in (None, LEAST))
    assert_same(two, one)
    assert "conv1.weight" not in two
    model.float()

    def loss(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x.float())
        return out.float().square().mean()

    (one, a), (two, b) = (clipped(model, loss, budget) for budget in (None, LEAST))
    torch.testing.assert_close(b.norms, a.norms, rtol=2e-2, atol=0)
    total = torch.cat([g.flatten() for g in one.values()])
    again = torch.cat([g.flatten() for g in two.values()])
    assert (again - total).norm() <= 2e-2 * total.norm()
    assert all(g.dtype == torch.float32 for g in two.values())


def test_physical_batches_add_up_and_an_empty_one_adds_nothing():
    torch.manual_seed(0)
    model = Part().double()
    x, y = torch.randn(7, 2, 6, 6, dtype=torch.double), torch.randint(3, (7,))
    sums = []
    for parts in (7, 3, 1):
        model.zero_grad()
        with clip_per_sample(model, 0.3, "sum", memory_budget=LEAST) as clip:
            for part in (*zip(x.split(parts), y.split(parts), strict=True), (x[:0], y[:0])):
                F.cross_entropy(model(part[0]), part[1], reduction="sum").backward()
        assert clip.take().samples == 7
        sums.append(grads_of(model))
    assert_same(sums[1], sums[0])
    assert_same(sums[2], sums[0])


def test_a_second_backward_through_the_same_graph_is_refused():
    model, x = make("in-place residual")
    with clip_per_sample(model, 0.3, memory_budget=LEAST):
        loss = squared_loss(model, x)
        loss.backward(retain_graph=True)
        expected = grads_of(model)
        with pytest.raises(CaptureError, match=r"second time through the same forward pass.*memory_budget"):
            loss.backward()
        assert_same(grads_of(model), expected)
        model.zero_grad()
        squared_loss(model, x).backward()  # and all is well again
        assert_same(grads_of(model), expected)


def test_a_tensor_that_leaves_the_module_beside_its_outputs_is_refused():
    model, x = make("in-place residual")
    kept = []
    model.conv2.register_forward_hook(lambda m, args, out: kept.append(out))
    with clip_per_sample(model, 0.3, memory_budget=LEAST):
        loss = squared_loss(model, x) + kept[-1].square().mean()
        with pytest.raises(CaptureError, match=r"'conv\d'.*only what the module returns"):
            loss.backward()
        assert not grads_of(model)
        kept.clear()
        squared_loss(model, x).backward()
    again = grads_of(model)
    model.zero_grad()
    with clip_per_sample(model, 0.3):
        squared_loss(model, x).backward()
    assert_same(again, grads_of(model))


def test_an_input_that_is_written_to_is_refused_if_it_requires_grad():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    x = torch.randn(6, 4)
    with clip_per_sample(model, 0.3, memory_budget=LEAST):
        model(x.clone()).sum().backward()
        with pytest.raises(CaptureError, match=r"wrote to an input.*clone\(\)"):
            model(x.requires_grad_() * 1)


def test_a_submodule_that_is_called_by_itself_is_held_or_refused():
    model, x = make("in-place residual")

    def loss(model):
        return model.head(model.conv1(x).mean((2, 3))).square().mean()

    one, two = (clipped(model, loss, budget)[0] for budget in (None, 10**6))
    assert_same(two, one)
    model.zero_grad()
    with clip_per_sample(model, 0.3, memory_budget=LEAST):
        with pytest.raises(ConfigError, match="'head' was called by itself"):
            loss(model).backward()
        assert not grads_of(model)
        squared_loss(model, x).backward()
        with pytest.raises(ConfigError, match="'head' was called by itself"):
            (squared_loss(model, x) + loss(model)).backward()


@pytest.mark.parametrize("budget", [None, LEAST, 10**6])
def test_a_backward_pass_that_is_refused_at_its_end_leaves_nothing_to_the_next(budget):
    model, x = make("in-place residual")
    model.head.bias.requires_grad_(False)
    expected, _ = clipped(model, lambda m: squared_loss(m, x), None)
    model.zero_grad()
    with clip_per_sample(model, 0.3, memory_budget=budget):
        loss = squared_loss(model, x)
        model.head.bias.requires_grad_()
        with pytest.raises(CaptureError, match=r"requires_grad.*head\.bias"):
            loss.backward()
        model.head.bias.requires_grad_(False)
        squared_loss(model, x).backward()
    assert_same(grads_of(model), expected)


def test_a_parameter_that_is_used_outside_of_its_module_is_still_refused():
    model, x = make("in-place residual")

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) + self.model.conv1.weight.square().sum()

    whole = Penalised()
    with clip_per_sample(whole, 0.3, memory_budget=LEAST):
        loss = whole(x).square().mean()
        with pytest.raises(CaptureError, match=r"conv1\.weight' got an ordinary gradient"):
            loss.backward()


def graphs_alive():
    return sum(type(o) is RepeatableCall for o in gc.get_objects())


def test_nothing_of_a_forward_pass_outlives_its_output():
    model, x = make("nested")
    gc.collect()
    gc.disable()  # a cycle through autograd's nodes would not be found
    try:
        with clip_per_sample(model, 0.3, memory_budget=LEAST):
            out = model(x.requires_grad_())
            assert graphs_alive() == 1
            del out
            assert graphs_alive() == 0
            with torch.no_grad():
                assert model(x).grad_fn is None
            loss = squared_loss(model, x)
            loss.backward()
            assert graphs_alive() == 1  # the loss still has it, and it has nothing
            del loss
            assert graphs_alive() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, float("nan"), float("inf"), "1 GiB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(wrong):
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="memory_budget must be a positive whole number of bytes"):
        clip_per_sample(model, 1.0, memory_budget=wrong)
    clip_per_sample(model, 1.0, memory_budget=1).remove()  # nothing was attached


def test_an_ensemble_has_no_budget():
    ensemble = Ensemble.from_factory(lambda: nn.Linear(2, 2), seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"memory_budget is for one model, and Ensemble is several"):
        clip_per_sample(ensemble, 1.0, memory_budget=10**6)
