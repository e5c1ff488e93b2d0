"""A module whose backward runs twice: everything around it is as with once, or refused by name."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, ConfigError, clip_per_sample
from psgrad.capture.repeatable import RepeatableCall
from tests.capture.test_capture import make
from tests.clipping.test_memory_budget import LEAST, Part, assert_same, clipped, grads_of
from tests.model_oracle import squared_loss


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
    one, two = (clipped(model, lambda m: F.relu_(m(x)).mean(), budget)[0] for budget in (None, LEAST))
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


class Rounding(torch.autograd.Function):
    """Noise on the gradient, as stochastic rounding makes it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g + torch.randn_like(g)


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(Rounding.apply(self.a(x)))


def test_a_backward_that_draws_random_numbers_draws_the_same_in_both_passes():
    model, x = Rounded().double(), torch.randn(6, 4, dtype=torch.double)
    seen = []
    for budget in (None, LEAST):
        with clip_per_sample(model, 0.3, memory_budget=budget) as clip:
            squared_loss(model, x).backward()
            model.zero_grad()
            torch.manual_seed(1)
            squared_loss(model, x).backward()
        seen.append((grads_of(model), torch.randn(3)))
    assert clip.result.passes == 2
    assert_same(seen[1][0], seen[0][0])
    torch.testing.assert_close(seen[1][1], seen[0][1])  # and what is drawn after is as ever


@functorch_config.patch(donated_buffer=False)
def test_compiled_submodules():
    torch.manual_seed(0)
    inner = torch.compile(nn.Sequential(nn.Tanh(), nn.Softmax(1)), backend="aot_eager")
    model = nn.Sequential(nn.Linear(4, 5), inner, nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.double)
    (one, _), (two, result) = (clipped(model, lambda m: squared_loss(m, x), b) for b in (None, LEAST))
    assert_same(two, one)
    assert result.passes == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["in-place residual", "nested", "parametrized"])
def test_on_a_gpu(name):
    model, x = make(name)
    expected, _ = clipped(model, lambda m: squared_loss(m, x), None)
    model, x = model.cuda(), x.cuda()
    model.zero_grad()

    def loss(model):
        out = model(x)
        return (out.sin() * torch.linspace(0.5, 1.5, out[0].numel()).to(out)).flatten(1).sum(1).mean()

    found, result = clipped(model, loss, LEAST)
    assert_same({name: grad.cpu() for name, grad in found.items()}, expected)
    assert result.passes == 2


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
        model(x.clone()).mean().backward()
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


def test_a_parameter_that_is_used_outside_of_the_model_is_still_refused():
    model, x = make("in-place residual")
    with clip_per_sample(model, 0.3, memory_budget=LEAST):
        loss = squared_loss(model, x) + model.conv1.weight.square().sum()
        with pytest.raises(CaptureError, match=r"conv1\.weight' got an ordinary gradient"):
            loss.backward()


def graphs_alive():
    return sum(type(o) is RepeatableCall for o in gc.get_objects())


def test_nothing_of_a_forward_pass_outlives_its_output():
    model, x = make("nested")
    torch.ones(
        1, requires_grad=True
    ).sum().backward()  # torch keeps what a failed backward left until the next
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
