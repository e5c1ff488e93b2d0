"""Capture on the models people have: exact, complete, and gone when removed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import CaptureError, PerSampleGrads, RefusedModelError, ShapeError, clip_per_sample
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
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
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


def test_a_parameter_used_elsewhere_is_named():
    class UsesChildsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"linear": nn.Linear(3, 3)})

        def forward(self, x):
            return F.linear(self.inner["linear"](x), self.inner["linear"].weight)

    model = UsesChildsWeight()
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"inner\.linear\.weight"):
        model(torch.randn(2, 3)).sum().backward()


def test_a_penalty_on_weights_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"0\.weight.*weight_decay"):
        (model(torch.randn(2, 3)).mean() + model[0].weight.square().sum()).backward()


def test_after_a_failed_backward_the_next_one_is_clean():
    model, x = make("in-place residual")
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        handle = model.conv1.register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            squared_loss(model, x + 1).backward()
        handle.remove()
        model.zero_grad()
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path])


def test_batch_norm_is_refused_by_path():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU()))
    with pytest.raises(RefusedModelError, match=r"1\.0 \(BatchNorm2d\).*GroupNorm"):
        PerSampleGrads(model)
    with PerSampleGrads(model.eval()):
        model(torch.randn(2, 3, 4, 4)).sum().backward()
        model.train()
        with pytest.raises(RefusedModelError, match=r"1\.0"):
            model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "running statistics"),
        (nn.SyncBatchNorm(3), "statistics of the whole batch"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "statistics of the whole batch"),
    ],
)
def test_settings_without_per_sample_gradients_are_refused(layer, reason):
    with pytest.raises(RefusedModelError, match=reason):
        PerSampleGrads(nn.Sequential(layer, nn.Linear(2, 2)))


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(RefusedModelError, match="no trainable parameter"):
        PerSampleGrads(nn.Sequential(nn.ReLU()))


def test_a_parameter_unfrozen_after_attaching_is_named():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    with PerSampleGrads(model):
        model[0].requires_grad_(True)
        with pytest.raises(CaptureError, match=r"0\.bias, 0\.weight"):
            model(torch.randn(2, 3))
        with pytest.raises(CaptureError, match=r"0\.bias, 0\.weight"):
            model[1](model[0](torch.randn(2, 3))).sum().backward()


def test_a_second_handle_is_refused():
    model = nn.Linear(2, 2)
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match="attached already"):
        PerSampleGrads(model)


def test_a_batch_of_the_wrong_rank_names_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with PerSampleGrads(model), pytest.raises(ShapeError, match=r"0 \(Conv2d\).*batch.*\(3, 5, 5\)"):
        model(torch.randn(3, 5, 5))


def test_rows_that_are_not_samples_name_the_layer():
    class Frames(nn.Module):
        """Every frame a row, then averaged: clipping these rows would not clip samples."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    model = Frames()
    with PerSampleGrads(model), pytest.raises(ShapeError, match=r"conv \(Conv2d\).*6 rows.*2 rows"):
        model(torch.randn(2, 3, 3, 5, 5))


def test_rows_per_sample_must_divide_the_batch():
    model = nn.Linear(2, 2)
    with PerSampleGrads(model, rows_per_sample=2), pytest.raises(ShapeError, match="rows_per_sample=2"):
        model(torch.randn(3, 2))


def test_batches_of_two_sizes_in_one_backward():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with PerSampleGrads(model), pytest.raises(ShapeError, match="samples in"):
        (model["a"](torch.randn(3, 2)).sum() + model["b"](torch.randn(4, 2)).sum()).backward()


def test_a_module_vmap_cannot_run_is_named_with_a_way_out():
    class Unmappable(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.w * x.sum().item()

    model = nn.Sequential(nn.Linear(3, 3), Unmappable())
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"1 \(Unmappable\).*vmap"):
        model(torch.randn(2, 3))


def test_second_backward_through_one_forward_is_a_clear_error():
    model = nn.Linear(2, 2)
    with PerSampleGrads(model):
        loss = model(torch.randn(3, 2, requires_grad=True)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(CaptureError, match="second backward"):
            loss.backward()


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
