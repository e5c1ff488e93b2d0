"""Backward refuses a loss that is not what `loss_reduction` says, and lets pass what it cannot know."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import ConfigError, GradNorms, PerSampleGrads, clip_per_sample
from psgrad.dp import PrivacyEngine

N, C = 12, 4
CLASSES, VALUES, SIGNS = torch.arange(N) % C, torch.rand(N, C), torch.ones(N, C)
TWO = ("mean", "sum")

MODULES = {
    nn.L1Loss: (VALUES,),
    nn.MSELoss: (VALUES,),
    nn.CrossEntropyLoss: (CLASSES,),
    nn.HuberLoss: (VALUES,),
    nn.SmoothL1Loss: (VALUES,),
    nn.BCEWithLogitsLoss: (VALUES,),
    nn.SoftMarginLoss: (SIGNS,),
    nn.MultiMarginLoss: (CLASSES,),
    nn.MultiLabelMarginLoss: (CLASSES[:, None].expand(N, C),),
    nn.HingeEmbeddingLoss: (SIGNS,),
    nn.PoissonNLLLoss: (VALUES,),
    nn.TripletMarginLoss: (VALUES, VALUES + 1),
}
"""Losses of torch whose reduction is known for certain, with what they take beside the model's output."""

FUNCTIONS = {
    "log_softmax and nll": lambda z, r: F.nll_loss(z.log_softmax(1), CLASSES, reduction=r),
    "bce": lambda z, r: F.binary_cross_entropy(z.sigmoid(), VALUES, reduction=r),
    "nll on maps": lambda z, r: F.cross_entropy(z[:, :, None, None], CLASSES[:, None, None], reduction=r),
    "label smoothing": lambda z, r: F.cross_entropy(z, CLASSES, label_smoothing=0.1, reduction=r),
    "by hand": lambda z, r: reduced((z - VALUES) ** 2, r),
    "by hand, over a sample first": lambda z, r: reduced((z - VALUES).pow(2).mean(-1), r),
    "norms": lambda z, r: reduced((z - VALUES).norm(dim=1), r),
    "picked": lambda z, r: -reduced(z.log_softmax(1)[torch.arange(N), CLASSES], r),
    "of none": lambda z, r: reduced(F.cross_entropy(z, CLASSES, reduction="none"), r),
    "over axis 0": lambda z, r: getattr(F.mse_loss(z, VALUES, reduction="none").sum(1), r)(0),
    "rows of a sample": lambda z, r: F.cross_entropy(
        z.view(-1, 2), torch.zeros(N * C // 2, dtype=torch.long), reduction=r
    ),
    "autocast": lambda z, r: F.mse_loss(z.bfloat16(), VALUES.bfloat16(), reduction=r),
    "two losses": lambda z, r: (
        F.mse_loss(z, VALUES, reduction=r) + 0.4 * F.cross_entropy(z, CLASSES, reduction=r)
    ),
    "a constant": lambda z, r: 1.5 * F.mse_loss(z, VALUES, reduction=r),
    "a divisor": lambda z, r: F.mse_loss(z, VALUES, reduction=r) / 2,
    "the mean of a scalar": lambda z, r: F.mse_loss(z, VALUES, reduction=r).mean(),
    "the sum of a scalar": lambda z, r: F.mse_loss(z, VALUES, reduction=r).sum(),
}
"""Other losses that are known for certain."""


class Mul(torch.autograd.Function):
    """Named as one of torch's own."""

    @staticmethod
    def forward(ctx, z):
        return z / N

    @staticmethod
    def backward(ctx, g):
        return g / N


OTHERS = {
    "batchmean": ("mean", lambda z: F.cross_entropy(z, CLASSES, reduction="sum") / N),
    "a mean times N": ("sum", lambda z: N * F.cross_entropy(z, CLASSES)),
    "sample after sample": (
        "sum",
        lambda z: sum(F.cross_entropy(z[i : i + 1], CLASSES[i : i + 1]) for i in range(N)),
    ),
    "row after row": ("sum", lambda z: sum(F.mse_loss(z[i], VALUES[i]) for i in range(N))),
    "weights that add up to 1": ("mean", lambda z: (F.mse_loss(z, VALUES, reduction="none") / N).sum()),
    "a constant divisor": ("sum", lambda z: F.cross_entropy(z, CLASSES, reduction="sum") / N),
    "a constant factor": ("mean", lambda z: F.cross_entropy(z, CLASSES) * N),
    "a function of one's own": ("mean", lambda z: Mul.apply(z).sum()),
    "a weight each": ("mean", lambda z: (z.square().sum(1) * torch.full((N,), 1 / N)).sum()),
    "class weights of 1/N": (
        "mean",
        lambda z: F.cross_entropy(z, CLASSES, torch.full((C,), 1 / N), reduction="sum"),
    ),
    "a sum over time beside": ("mean", lambda z: F.mse_loss(z, VALUES) + 1e-3 * z.abs().sum()),
    "one sample of many": ("sum", lambda z: z[0].mean() + z[1:].sum() / C),
    "classes, then samples": ("mean", lambda z: z.mean(0).sum()),
}
"""Losses that look like the other reduction, and are as said; not to be refused."""


def reduced(losses, reduction):
    return losses.mean() if reduction == "mean" else losses.sum()


def step(model, loss, attach):
    """One backward pass; the parameters' gradients afterwards."""
    torch.manual_seed(0)
    x = torch.randn(N, 5)
    with attach(model):
        loss(model(x)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("wanted", TWO)
@pytest.mark.parametrize("actual", TWO)
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_losses_of_torch(kind, actual, wanted):
    check(lambda z: kind(reduction=actual)(z, *MODULES[kind]), actual, wanted)


@pytest.mark.parametrize("wanted", TWO)
@pytest.mark.parametrize("actual", TWO)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_losses_of_ones_own(function, actual, wanted):
    check(lambda z: function(z, actual), actual, wanted)


def check(loss, actual, wanted):
    model = nn.Sequential(nn.Linear(5, C), nn.Tanh())
    if actual == wanted:
        step(model, loss, lambda m: GradNorms(m, wanted))
        return
    with pytest.raises(ConfigError, match=f'is the {actual} over the batch.*Give loss_reduction="{actual}"'):
        step(model, loss, lambda m: GradNorms(m, wanted))
    assert all(p.grad is None for p in model.parameters())  # nothing was computed


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_no_false_alarm(case):
    said, loss = case
    step(nn.Linear(5, C), loss, lambda m: GradNorms(m, said))


UNKNOWN = {
    "targets that may hold the 1/N": lambda z: F.cross_entropy(z, VALUES, reduction="sum"),
    "another model on top": lambda z: nn.Linear(C, C)(z).sum(),
    "compiled": lambda z: torch.compile(F.mse_loss, backend="aot_eager")(z, VALUES, reduction="sum"),
}


@pytest.mark.parametrize("loss", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("wanted", TWO)
def test_what_is_not_certain_passes(loss, wanted):
    step(nn.Linear(5, C), loss, lambda m: GradNorms(m, wanted))


@pytest.mark.parametrize(
    "attach",
    [
        PerSampleGrads,
        GradNorms,
        lambda m: clip_per_sample(m, 1.0),
        lambda m: clip_per_sample(m, 1.0, memory_budget=1),
    ],
    ids=["PerSampleGrads", "GradNorms", "clip_per_sample", "clip_per_sample in two passes"],
)
def test_every_handle_looks_and_the_next_step_is_as_ever(attach):
    model, x = nn.Linear(5, C), torch.randn(N, 5)
    other = copy.deepcopy(model)
    with attach(model), attach(other):
        loss = F.mse_loss(model(x), VALUES, reduction="sum")
        with pytest.raises(ConfigError, match="12 times"):
            loss.backward()
        for m in (model, other):
            F.mse_loss(m(x), VALUES).backward()
    torch.testing.assert_close(model.weight.grad, other.weight.grad, rtol=0, atol=0)


class Tokens(nn.Module):
    """Its own parameter makes it run one sample at a time."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, C)

    def forward(self, x):
        return self.head(torch.tanh(x * self.token))


@pytest.mark.parametrize("under", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("around", [lambda m, x: m(x), partial(checkpoint, use_reentrant=False)])
@pytest.mark.parametrize("actual", TWO)
def test_whatever_runs_the_model(actual, around, under):
    model = Tokens()
    x = torch.randn(N, 5)
    with GradNorms(model, "mean"), under():
        loss = F.cross_entropy(around(model, x), CLASSES, reduction=actual)
        if actual == "mean":
            loss.backward()
        else:
            with pytest.raises(ConfigError, match="is the sum"):
                loss.backward()


def test_the_private_engine_looks():
    model = nn.Linear(5, C)
    data = torch.utils.data.TensorDataset(torch.randn(24, 5), torch.rand(24, C))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    x, y = next(iter(loader))
    with pytest.raises(ConfigError, match="sum over the batch"):
        F.mse_loss(model(x), y, reduction="sum").backward()
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.clip.remove()


def test_one_sample_is_its_own_mean_and_no_sample_is_nothing():
    model = nn.Linear(5, C)
    with GradNorms(model, "mean"):
        for rows in (1, 0):
            model(torch.randn(rows, 5)).sum().backward()


def test_rows_of_a_sample_are_one_sample():
    model = nn.Linear(5, C)
    with GradNorms(model, "mean", rows_per_sample=N):
        F.mse_loss(model(torch.randn(N, 5)), VALUES, reduction="sum").backward()  # N = 1
    with GradNorms(model, "mean", rows_per_sample=2), pytest.raises(ConfigError, match="6 times"):
        F.mse_loss(model(torch.randn(N, 5)), VALUES, reduction="sum").backward()


def test_a_gradient_that_is_given_is_not_judged():
    model = nn.Linear(5, C)
    with GradNorms(model, "mean") as monitor:
        F.mse_loss(model(torch.randn(N, 5)), VALUES, reduction="sum").backward(torch.tensor(1 / N))
    assert monitor.norms.shape == (N,)


def test_the_handles_of_two_models_look_at_their_own_losses():
    one, other = nn.Linear(5, C), nn.Linear(5, C)
    x = torch.randn(N, 5)
    with GradNorms(one, "mean"), GradNorms(other, "sum"):
        F.mse_loss(one(x), VALUES).backward()
        F.mse_loss(other(x), VALUES, reduction="sum").backward()
        with pytest.raises(ConfigError, match="is the mean"):
            F.mse_loss(other(x), VALUES).backward()
        with pytest.raises(ConfigError, match="is the sum"):
            torch.autograd.backward(tensors=(F.mse_loss(one(x), VALUES, reduction="sum"),))
        torch.autograd.backward(
            F.mse_loss(m(x), VALUES, reduction=r) for m, r in ((one, "mean"), (other, "sum"))
        )


class TestDivisors:
    """A mean by something else than the number of samples."""

    classes = torch.tensor([0, 1, -100, 3, -100, 1] * 2)

    def test_ignored_targets_and_class_weights_make_samples_mix(self):
        model, x = nn.Linear(5, C), torch.randn(N, 5)
        with clip_per_sample(model, 1.0):
            with pytest.raises(ConfigError, match="not ignored, 8 of 12"):
                F.cross_entropy(model(x), self.classes).backward()
            with pytest.raises(ConfigError, match="weights of its targets' classes"):
                F.cross_entropy(model(x), CLASSES, torch.rand(C)).backward()
            F.cross_entropy(model(x), CLASSES, torch.ones(C)).backward()
            F.cross_entropy(model(x), CLASSES).backward()
        with clip_per_sample(model, 1.0, "sum"):
            F.cross_entropy(model(x), self.classes, torch.rand(C), reduction="sum").backward()

    def test_what_mixes_is_so(self):
        """Another sample changes what the others contribute: the reason to refuse it."""
        model, x = nn.Linear(5, C), torch.randn(N, 5)
        alone = torch.autograd.grad(F.cross_entropy(model(x)[:2], self.classes[:2]) * 2, model.weight)[0]
        beside = torch.autograd.grad(F.cross_entropy(model(x)[:3], self.classes[:3]) * 3, model.weight)[0]
        assert not torch.allclose(alone, beside)  # though the third sample's own gradient is zero

    def test_norms_are_warned_of_once(self, recwarn):
        model, x = nn.Linear(5, C), torch.randn(N, 5)
        with GradNorms(model):
            for _ in range(2):
                F.cross_entropy(model(x), self.classes).backward()
        said = [str(w.message) for w in recwarn if "norms are off" in str(w.message)]
        assert len(said) == 1
        assert "8 of 12" in said[0]

    @pytest.mark.parametrize("turned", [False, True])
    def test_as_many_of_every_sample_are_a_mean_over_samples(self, turned):
        model = nn.Linear(5, 3 * C)
        targets = (torch.arange(N * 3) % C).view(N, 3)
        targets[:, -1] = -100
        with clip_per_sample(model, 1.0):
            z = model(torch.randn(N, 5)).view(N, 3, C)
            if turned:
                z, targets = z.transpose(0, 1), targets.T
            F.cross_entropy(z.reshape(-1, C), targets.reshape(-1)).backward()


@pytest.mark.usefixtures("unwatched")
def test_nothing_is_left_behind():
    before = torch.autograd.backward
    one, other = nn.Linear(5, C), nn.Linear(5, C)
    first, second = GradNorms(one), GradNorms(other)
    assert torch.autograd.backward is not before
    first.remove()
    first.remove()
    assert torch.autograd.backward is not before
    second.remove()
    assert torch.autograd.backward is before
    handle = GradNorms(one)
    del one, other, first, second, handle  # never removed
    gc.collect()
    torch.zeros((), requires_grad=True).square().backward()
    assert torch.autograd.backward is before


@pytest.mark.usefixtures("unwatched")
def test_somebody_elses_wrapper_stays():
    model, seen = nn.Linear(5, C), []
    before = torch.autograd.backward
    handle = GradNorms(model)
    ours = torch.autograd.backward

    def theirs(*args, **kwargs):
        seen.append(1)
        return ours(*args, **kwargs)

    torch.autograd.backward = theirs
    try:
        handle.remove()
        assert torch.autograd.backward is theirs
        model(torch.randn(N, 5)).sum().backward()
        assert seen == [1]
        assert torch.autograd.backward is theirs
    finally:
        torch.autograd.backward = before


def test_threads_look_at_their_own_losses():
    def run(reduction):
        model = nn.Linear(5, C)
        for _ in range(20):
            with GradNorms(model, reduction):
                z = model(torch.randn(N, 5))
                F.mse_loss(z, VALUES, reduction=reduction).backward()
                z = model(torch.randn(N, 5))
                try:
                    F.mse_loss(z, VALUES, reduction="sum" if reduction == "mean" else "mean").backward()
                except ConfigError:
                    continue
                raise AssertionError("not refused")

    before = torch.autograd.backward
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, TWO * 4))
    assert torch.autograd.backward is before
