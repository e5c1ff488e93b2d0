"""Capture on the models people have: exact, complete, and gone when removed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import PerSampleGrads, clip_per_sample
from tests.model_oracle import grads_one_by_one, squared_loss


class Residual(nn.Module):
    """In-place activations and an in-place residual, as torchvision writes them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(x))
        out += x
        return self.head(F.relu_(out).mean((2, 3)))


class InPlaceRightAfterLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        x.tanh_()
        x = self.linear(x.mean((2, 3))[:, None])  # a 3-D input: torch's own linear returns a view
        x.mul_(2)
        return x[:, 0]


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        return self.linear(self.linear(x.mean((2, 3))))


class Tied(nn.Module):
    """One weight as an embedding and as the output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.out = nn.Linear(3, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words):
        return self.out(torch.tanh(self.embedding(words)).sum(1))


class OwnParameters(nn.Module):
    """Parameters that belong to no known layer, on a module with children."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return (self.mix(x + self.position) * self.scale).sum(1)


class Temperature(nn.Module):
    """A parameter that is a scalar, as CLIP's logit_scale."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.head(x) * self.temperature.exp()


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.own = OwnParameters()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.own(x)


def parametrized():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


IMAGES = (3, 5, 5)
MODELS = {
    "in-place residual": (Residual, IMAGES),
    "in-place right after a layer": (InPlaceRightAfterLayer, IMAGES),
    "layers called twice": (CalledTwice, IMAGES),
    "tied weights": (Tied, "words"),
    "own parameters": (OwnParameters, (5, 4)),
    "a scalar": (Temperature, (4,)),
    "nested": (Nested, (5, 3)),
    "parametrized": (parametrized, IMAGES),
    "first layer is the model": (lambda: nn.Conv2d(3, 2, 3), IMAGES),
}


def make(name, rows=6):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    x = torch.randint(6, (rows, 4)) if shape == "words" else torch.randn(rows, *shape, dtype=torch.double)
    return build().double(), x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_per_sample", [1, 2, 3])
def test_every_parameter_of_every_model(name, rows_per_sample):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    ordinary = grads_one_by_one(model, squared_loss, [x], len(x))
    with PerSampleGrads(model, rows_per_sample=rows_per_sample):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path], msg=lambda m, path=path: f"{path}: {m}")
        torch.testing.assert_close(p.grad, ordinary[path][0])


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


@pytest.mark.parametrize("name", MODELS)
def test_empty_batch(name):
    model, x = make(name, rows=0)
    with PerSampleGrads(model, "sum"):
        model(x).sum().backward()
    assert all(p.grad_sample.shape == (0, *p.shape) for p in model.parameters())
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "offset"])
def test_input_of_any_memory_layout(layout):
    model, x = make("in-place residual")
    x = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3),
        "expanded": lambda: x[:1, :, :, :1].expand(6, 3, 5, 5),
        "offset": lambda: torch.randn(9, 5, 7, 7, dtype=torch.double)[2:8, 1:4, 1:6, 2:],
    }[layout]()
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path])


def test_input_gradient_is_the_ordinary_one():
    model, x = make("in-place residual")
    reference = x.clone().requires_grad_()
    squared_loss(model, reference).backward()
    model.zero_grad()
    captured = x.clone().requires_grad_()
    with PerSampleGrads(model):
        squared_loss(model, captured).backward()
    torch.testing.assert_close(captured.grad, reference.grad, rtol=0, atol=0)


def test_frozen_layers_pay_nothing_and_get_nothing():
    model, x = make("in-place residual")
    model.conv2.requires_grad_(False)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad_sample, expected[path])
        else:
            assert not hasattr(p, "grad_sample")
            assert p.grad is None


def test_two_forward_passes_in_one_backward_add_up():
    model, x = make("in-place residual")
    other = torch.randn_like(x)

    def loss_of(model, x, other):
        return squared_loss(model, x) + 2 * squared_loss(model, other)

    expected = grads_one_by_one(model, loss_of, [x, other])
    with PerSampleGrads(model):
        loss_of(model, x, other).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path])


def test_grad_grows_and_grad_sample_does_not():
    model, x = make("in-place residual")
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
        first = [(p.grad.clone(), p.grad_sample.clone()) for p in model.parameters()]
        squared_loss(model, x).backward()
    for p, (grad, grad_sample) in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
        torch.testing.assert_close(p.grad_sample, grad_sample)


def test_a_parameter_the_loss_does_not_reach_has_none_not_the_last_batch():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "sometimes": nn.Linear(3, 2)})
    x = torch.randn(4, 3)
    with PerSampleGrads(model):
        (model["used"](x) + model["sometimes"](x)).mean().backward()
        assert model["sometimes"].weight.grad_sample is not None
        model["used"](x).mean().backward()
    assert model["sometimes"].weight.grad_sample is None
    assert model["used"].weight.grad_sample is not None


def test_autocast():
    model, x = make("in-place residual")
    model, x = model.float(), x.float()
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = squared_loss(model, x)
        loss.backward()
    for path, p in model.named_parameters():
        assert p.grad_sample.dtype == torch.float32
        # bfloat16 has 8 bits: a few of its rounding steps at the scale of the tensor
        error = (p.grad_sample - expected[path]).norm() / expected[path].norm()
        assert error < 0.03, path


def test_no_grad_and_evaluation_run_as_without_psgrad():
    model, x = make("in-place residual")
    plain = model(x)
    with PerSampleGrads(model), torch.no_grad():
        out = model(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, plain, rtol=0, atol=0)


def test_remove_leaves_nothing_behind():
    model, x = make("nested")
    before = [dict(m.__dict__) for m in model.modules()]
    handle = PerSampleGrads(model)
    squared_loss(model, x).backward()
    handle.remove()
    handle.remove()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    model.zero_grad()
    squared_loss(model, x).backward()
    assert all(p.grad is not None for p in model.parameters())
    reference = weakref.ref(handle)
    del handle
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_free_of_the_capture(copied):
    model, x = make("in-place residual")
    with PerSampleGrads(model):
        clone = copied(model)
        with torch.no_grad():
            for p in clone.parameters():
                p.zero_()
        assert not clone(x).any()  # its own weights, not the captured model's
        squared_loss(clone, x).backward()
    assert all(p.grad is not None and not hasattr(p, "grad_sample") for p in clone.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["in-place residual", "tied weights", "own parameters", "layers called twice"]
)
def test_models_in_half_precision(name, dtype):
    model, x = make(name)
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    expected = grads_one_by_one(model.double(), squared_loss, [x.double() if x.is_floating_point() else x])
    model = model.to(dtype)
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        assert p.grad_sample.dtype == dtype
        error = (p.grad_sample.double() - expected[path]).norm() / expected[path].norm()
        # a handful of layers, each rounding its output and its gradients once or twice
        assert error < 12 * torch.finfo(dtype).eps, path
    with clip_per_sample(model, 0.1) as clip:
        squared_loss(model, x).backward()
    assert clip.result.norms.dtype == torch.float32
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    torch.testing.assert_close(clip.result.norms.double(), norms, rtol=12 * torch.finfo(dtype).eps, atol=0)
