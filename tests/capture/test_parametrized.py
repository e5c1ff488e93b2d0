"""Weights that are computed from parameters: standardised, normed, low-rank, tied."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from psgrad import PerSampleGrads, RefusedModelError, clip_per_sample
from tests.model_oracle import grads_one_by_one, squared_loss


class Standardised(nn.Module):
    """Weight standardisation (Qiao et al. 2019), with the gain of NF-ResNets."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, weight):
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return self.gain * centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-4).sqrt()


class LowRank(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.a = nn.Parameter(torch.randn(outputs, 1))
        self.b = nn.Parameter(torch.randn(1, inputs))

    def forward(self, weight):
        return weight + self.a @ self.b


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 2), nn.LayerNorm(2))


def weight_standardised():
    model = network()
    parametrize.register_parametrization(model[0], "weight", Standardised(4))
    return model


def weight_normed():
    model = network()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[3])
    return model


def low_rank_beside_frozen():
    model = network().requires_grad_(False)
    parametrize.register_parametrization(model[3], "weight", LowRank(2, 36))
    model[3].parametrizations.weight.original.requires_grad_(False)
    return model


def spectral():
    model = network()
    parametrizations.spectral_norm(model[0])
    return model.eval()  # in training mode every forward pass changes its estimate


def twice():
    model = network()
    parametrize.register_parametrization(model[0], "weight", Standardised(4))
    parametrize.register_parametrization(model[0], "weight", Standardised(4))
    parametrizations.weight_norm(model[0], "bias", dim=0)
    return model


class InRegion(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.inner = weight_standardised()

    def forward(self, x):
        return self.inner(self.inner[0](x * self.scale).mean((2, 3), keepdim=True)[:, :3] * x)


MODELS = {
    f.__name__: f
    for f in (weight_standardised, weight_normed, low_rank_beside_frozen, spectral, twice, InRegion)
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    return model, torch.randn(6, 3, 5, 5, dtype=torch.double)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_per_sample", [1, 3])
def test_every_parameter(name, rows_per_sample):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    assert len(expected) > 1
    with PerSampleGrads(model, rows_per_sample=rows_per_sample):
        squared_loss(model, x).backward()
    for path, grads in expected.items():
        torch.testing.assert_close(
            model.get_parameter(path).grad_sample, grads, msg=lambda m, p=path: f"{p}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("held", ["written", "operands"])
def test_clipped_sum(name, held, monkeypatch):
    from psgrad.layers import RULES

    for rule in set(RULES.values()):
        monkeypatch.setattr(type(rule), "keeps_grads", lambda self, call: held == "written")
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    factors = (norms.median() / norms).clamp(max=1)
    with clip_per_sample(model, norms.median().item(), "sum") as clip:
        (squared_loss(model, x) * len(x)).backward()
    torch.testing.assert_close(clip.result.norms, norms)
    for path, grads in expected.items():
        torch.testing.assert_close(model.get_parameter(path).grad, torch.tensordot(factors, grads, 1))


@pytest.mark.parametrize("name", MODELS)
def test_empty_batch(name):
    model, x = make(name)
    with PerSampleGrads(model, "sum"):
        model(x[:0]).sum().backward()
    for p in model.parameters():
        if p.requires_grad:
            assert p.grad_sample.shape == (0, *p.shape)
            assert not p.grad.any()


def test_spectral_norm_takes_its_step_once_in_training():
    model, x = make("spectral")
    model.train()
    plain = squared_loss(spectral_copy := make("spectral")[0].train(), x)
    with PerSampleGrads(model):
        loss = squared_loss(model, x)
        loss.backward()
    torch.testing.assert_close(loss, plain)
    norms = model[0].parametrizations.weight[0]
    torch.testing.assert_close(norms._u, spectral_copy[0].parametrizations.weight[0]._u)
    plain.backward()
    torch.testing.assert_close(
        model[0].parametrizations.weight.original.grad, spectral_copy[0].parametrizations.weight.original.grad
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_computed_by_a_hook_are_refused_with_a_way_out(norm):
    model = network()
    norm(model[0])
    with pytest.raises(RefusedModelError, match=r"0 \(Conv2d\).*parametrizations"):
        PerSampleGrads(model)
