"""Compiled parts of a model, and models compiled around psgrad, are exact; what cannot be is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import CaptureError, PerSampleGrads, RefusedModelError, clip_per_sample
from psgrad.clipping import clip_factors

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Residual(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class Scaling(nn.Module):
    """A parameter of its own: runs one sample at a time."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.randn(4, 1, 1)), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(torch.tanh(x * self.scale))


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), block, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Around(Net):
    """Runs one sample at a time itself, with the block inside."""

    def __init__(self, block):
        super().__init__(block)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return self.head((self.scale * self.block(self.stem(x))).mean((2, 3)))


def wrap_part(model, backend):
    model.block = torch.compile(model.block, backend=backend)
    return model


def compile_part(model, backend, **options):
    model.block.compile(backend=backend, **options)
    return model


def compile_layer(model, backend):
    model.stem.compile(backend=backend)
    return model


def compile_whole(model, backend):
    model.compile(backend=backend)
    return model


def wrap_whole(model, backend):
    return torch.compile(model, backend=backend)


def wrap_call(model, backend):
    return torch.compile(lambda x: model(x), backend=backend)


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(samples=5):
    torch.manual_seed(1)
    return torch.randn(samples, 3, 6, 6), torch.randint(0, 3, (samples,))


def one_by_one(model, x, y):
    """Every sample's gradients, by a copy in float64 that nothing has compiled."""
    torch._dynamo.reset()
    grads = []
    with torch.compiler.set_stance("force_eager"):
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(sample) for sample in zip(*grads, strict=True)]


def grads_of(model, run):
    """Every sample's gradients of the second of two batches, of other sizes."""
    for samples in (4, 5):
        x, y = batch(samples)
        F.cross_entropy(run(x), y).backward()
    got = [p.grad_sample for p in model.parameters()]
    return got, x, y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", [lambda b: Net(b), lambda b: Around(b)], ids=["net", "around"])
@pytest.mark.parametrize("block", [Residual, Scaling])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("how", [wrap_part, compile_part, compile_layer, compile_whole])
def test_a_compiled_part(how, warm, block, model, backend):
    torch.manual_seed(0)
    model = how(model(block()), backend)
    if warm:  # what was compiled before knows nothing of psgrad
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with PerSampleGrads(model):
        got, x, y = grads_of(model, model)
    torch.testing.assert_close(got, [g.float() for g in one_by_one(model.double(), x, y)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [Residual, Scaling])
@pytest.mark.parametrize("how", [compile_part, compile_layer, compile_whole, wrap_whole, wrap_call])
def test_compiled_after_attaching(how, block, backend):
    torch.manual_seed(0)
    model = Net(block())
    with PerSampleGrads(model):
        run = how(model, backend)
        got, x, y = grads_of(model, run)
    torch.testing.assert_close(got, [g.float() for g in one_by_one(model.double(), x, y)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_part_is_ordinary_again_afterwards(backend):
    torch.manual_seed(0)
    model = compile_part(Net(Residual()), backend)
    x, y = batch()
    with PerSampleGrads(model):
        F.cross_entropy(model(x), y).backward()
        expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_compiled_loss_and_a_compiled_step(reduction, backend):
    torch.manual_seed(0)
    model = Net(Residual())
    x, y = batch()
    exact = one_by_one(model.double(), x, y)
    model.float()
    criterion = torch.compile(lambda z, y: F.cross_entropy(z, y, reduction=reduction), backend=backend)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in exact]).norm(dim=0)
    factors = clip_factors(norms, 0.5)
    expected = [torch.einsum("n,n...->...", factors, g).float() for g in exact]
    if reduction == "mean":
        expected = [g / len(x) for g in expected]

    @torch.compile(backend=backend)
    def step():
        criterion(model(x), y).backward()

    with clip_per_sample(model, 0.5, reduction):
        for run in (lambda: criterion(model(x), y).backward(), step):
            model.zero_grad()
            run()
            torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_what_cannot_be_compiled_is_told():
    model = compile_part(Net(Residual()), "eager", fullgraph=True)
    x, y = batch()
    with PerSampleGrads(model), pytest.raises(Exception, match=r"psgrad is attached.*without fullgraph=True"):
        F.cross_entropy(model(x), y).backward()


def test_a_part_that_is_wrapped_after_attaching_is_refused_by_path():
    model = Net(Residual())
    with PerSampleGrads(model):
        wrap_part(model, "eager")
        with pytest.raises(CaptureError, match=r"block\.conv\.weight.*attach a new one"):
            model(batch()[0])


@pytest.mark.parametrize("attach", [PerSampleGrads, lambda m: clip_per_sample(m, 1.0)])
def test_a_compiled_model_is_refused_with_what_to_do(attach):
    model = torch.compile(nn.Linear(5, 4), backend="eager")
    with pytest.raises(RefusedModelError, match=r"OptimizedModule.*model\._orig_mod"):
        attach(model)
    with PerSampleGrads(model._orig_mod, "sum"):
        model._orig_mod(torch.randn(6, 5)).sum().backward()
    assert model._orig_mod.weight.grad_sample.shape == (6, 4, 5)


def test_a_forward_that_was_replaced_is_refused_by_path():
    model = Net(Scaling())
    model.block.forward = torch.compile(model.block.forward, backend="eager")
    with pytest.raises(RefusedModelError, match=r"block \(Scaling\): its forward was replaced"):
        PerSampleGrads(model)
