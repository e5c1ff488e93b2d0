"""Uses of a model that no per-sample gradient would be right for are refused, not passed over."""

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psgrad import CaptureError, GradNorms, PerSampleGrads, RefusedModelError, clip_per_sample


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, temperature, x):
        return self.layer(x) / temperature


class Matching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, prototypes):
        return self.layer(x) @ self.layer(prototypes).t()


class PrototypesFirst(Matching):
    def forward(self, prototypes, x):
        return super().forward(x, prototypes)


@pytest.mark.parametrize(("model", "first"), [(Scaled, (1,)), (PrototypesFirst, (3, 4))])
def test_a_first_input_that_is_not_the_batch(model, first):
    model = model()
    with clip_per_sample(model, 1.0, "sum"), pytest.raises(CaptureError, match=r"first tensor.*\(5, 4\)"):
        model(torch.rand(first), torch.randn(5, 4))


def test_support_shared_by_all_samples_goes_on_working():
    """The batch comes first; what comes after it may be embedded by the same layer."""
    torch.manual_seed(0)
    model, x, support = Matching().double(), torch.randn(5, 4).double(), torch.randn(3, 4).double()
    expected = []
    for row in x:
        (grad,) = torch.autograd.grad(model(row[None], support).square().sum(), model.layer.weight)
        expected.append(grad)
    with PerSampleGrads(model, "sum"):
        model(x, support).square().sum().backward()
    torch.testing.assert_close(model.layer.weight.grad_sample, torch.stack(expected))


def test_packed_sequences_whose_rows_are_no_samples():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, packed):
            return self.layer(packed.data)

    model, packed = Packed(), nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with clip_per_sample(model, 1.0):
        with torch.no_grad():
            assert model(packed).shape == (5, 3)
        with pytest.raises(CaptureError, match="pad a PackedSequence"):
            model(packed)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_whose_samples_differ_in_length(layout):
    model = nn.Linear(4, 3)
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=layout)
    with clip_per_sample(model, 1.0):
        with torch.no_grad():
            assert model(nested).is_nested
        with pytest.raises(CaptureError, match=r"nested tensor: .*to_padded_tensor"):
            model(nested)


def test_a_nested_tensor_beside_the_batch():
    class Both(nn.Linear):
        def forward(self, x, nested):
            return super().forward(x)

    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    model = Both(4, 3)
    with clip_per_sample(model, 1.0), pytest.raises(CaptureError, match="nested tensor"):
        model(torch.randn(2, 4), nested)


class FromUserDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch):
        h = self.layer(batch["x"])
        return h - h.mean(0)


def test_inputs_whose_tensors_nobody_sees():
    model, x = FromUserDict(), torch.randn(6, 4)
    with clip_per_sample(model, 1.0):
        with pytest.raises(CaptureError, match=r"UserDict.*model\(\*\*batch\)"):
            model(UserDict(x=x))
        with pytest.raises(RefusedModelError, match="mixes samples"):
            model({"x": x})
        with torch.no_grad():
            assert model(UserDict(x=x)).shape == (6, 3)


def test_batch_norm_in_a_loop_over_the_layers():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    with GradNorms(model) as monitor:
        model.train()
        with pytest.raises(RefusedModelError, match=r"1 .BatchNorm1d"):
            model[0](torch.randn(6, 4))
        model[1].eval()
        x = torch.randn(6, 4)
        for layer in model:
            x = layer(x)
        x.square().mean().backward()
        assert monitor.norms.shape == (6,)


def test_what_is_put_into_the_model_later_is_seen():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with GradNorms(model, "sum"):
        x = torch.randn(6, 4)
        model(x).sum().backward()
        activation, model[1] = model[1], nn.BatchNorm1d(5, affine=False)
        with pytest.raises(RefusedModelError, match=r"1 .BatchNorm1d"):
            model(x)
        model[1] = activation
        model(x).sum().backward()
        weight, model[0].weight = model[0].weight, nn.Parameter(torch.randn(5, 4))
        with pytest.raises(CaptureError, match=r"0\.weight"):
            model(x)
        model[0].weight = weight
        loss = model(x).sum()
        model[2].bias.requires_grad_(False)
        with pytest.raises(CaptureError, match=r"2\.bias"):
            loss.backward()


HOOKS = {
    "register_hook": lambda p: p.register_hook(lambda g: g * 0),
    "after": lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_parameters_which_nobody_would_call(hook):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    with PerSampleGrads(model, "sum"):
        model(x).sum().backward()
        handle = HOOKS[hook](model[0].weight)
        with pytest.raises(CaptureError, match=r"0\.weight: it has hooks"):
            model(x)
        handle.remove()
        model(x).sum().backward()
    HOOKS[hook](model[0].bias)
    with pytest.raises(RefusedModelError, match=r"0\.bias: it has hooks"):
        PerSampleGrads(model)
    model.requires_grad_(False)[0].weight.requires_grad_()
    PerSampleGrads(model).remove()


def test_complex_and_lazy_parameters():
    with pytest.raises(RefusedModelError, match=r"0\.weight: complex"):
        PerSampleGrads(nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)))
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(RefusedModelError, match=r"0\.weight: it has no values yet"):
        PerSampleGrads(lazy)
    lazy(torch.randn(2, 4))
    with PerSampleGrads(lazy):
        F.mse_loss(lazy(torch.randn(2, 4)), torch.zeros(2, 3)).backward()
    assert lazy[0].weight.grad_sample.shape == (2, 3, 4)
