"""Norms of every sample beside the ordinary gradient, on the models of the capture tests."""

import pytest
import torch
from torch import nn

from psgrad import ConfigError, GradNorms
from psgrad.layers.conv import Convolution
from psgrad.layers.linear import Linear
from psgrad.norm_statistics import outliers
from tests.capture.test_capture import MODELS, make
from tests.model_oracle import grads_one_by_one, squared_loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_per_sample", [1, 3])
def test_norms_and_ordinary_gradient_of_every_model(name, rows_per_sample):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    ordinary = grads_one_by_one(model, squared_loss, [x], len(x))
    with GradNorms(model, rows_per_sample=rows_per_sample) as monitor:
        squared_loss(model, x).backward()
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    torch.testing.assert_close(monitor.norms, norms)
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad, ordinary[path][0])


def test_norms_by_layer():
    model, x = make("in-place residual")
    expected = grads_one_by_one(model, squared_loss, [x])
    with GradNorms(model) as monitor:
        squared_loss(model, x).backward()
    assert set(monitor.per_layer) == {"conv1", "norm1", "conv2", "norm2", "head"}
    for layer, norms in monitor.per_layer.items():
        parts = [g.flatten(1).square().sum(1) for name, g in expected.items() if name.startswith(layer)]
        torch.testing.assert_close(norms, torch.stack(parts).sum(0).sqrt())


def test_sum_and_mean_measure_the_same():
    model, x = make("in-place residual")
    with GradNorms(model) as monitor:
        squared_loss(model, x).backward()
        mean = monitor.norms
    with GradNorms(model, "sum") as monitor:
        (squared_loss(model, x) * len(x)).backward()
    torch.testing.assert_close(monitor.norms, mean)


def test_what_is_not_finite_is_seen_and_left_in_the_gradient():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    x[1, 0] = float("nan")
    with GradNorms(model, "sum") as monitor:
        model(x).sum().backward()
    assert monitor.norms.isfinite().tolist() == [True, False, True, True]
    assert model.weight.grad[:, 0].isnan().all()
    assert model.weight.grad[:, 1:].isfinite().all()


def test_an_empty_batch():
    model = nn.Linear(3, 2)
    with GradNorms(model, "sum") as monitor:
        model(torch.zeros(0, 3)).sum().backward()
    assert monitor.norms.shape == (0,)


def test_before_a_backward_pass_there_is_nothing_to_read():
    with GradNorms(nn.Linear(2, 2)) as monitor, pytest.raises(ConfigError, match="no backward"):
        _ = monitor.norms


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_scale_is_that_of_the_written_out_gradients(reduction):
    model, x = make("in-place residual", rows=8)
    rows = torch.cat([g.flatten(1) for g in grads_one_by_one(model, squared_loss, [x]).values()], 1)
    with GradNorms(model, reduction) as monitor:
        (squared_loss(model, x) * (1 if reduction == "mean" else len(x))).backward()
    trace = rows.var(0).sum()  # unbiased, N - 1
    torch.testing.assert_close(monitor.noise_scale.trace, trace)
    torch.testing.assert_close(monitor.noise_scale.squared_norm, rows.mean(0).square().sum() - trace / 8)
    both = monitor.noise_scale + monitor.noise_scale
    torch.testing.assert_close(both.simple, monitor.noise_scale.simple)


def test_noise_scale_measures_a_spread_that_is_known():
    """Gradients N(mean, 1) in 50 dimensions: tr(Sigma) = 50 and |G|^2 = 50 * 4."""
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    total = None
    with GradNorms(model) as monitor:
        for _ in range(200):
            model(2 + torch.randn(8, 50)).mean().backward()
            total = monitor.noise_scale if total is None else total + monitor.noise_scale
    assert total.simple.item() == pytest.approx(50 / 200, rel=0.05)


def test_the_noise_of_one_sample_cannot_be_told():
    model = nn.Linear(3, 2)
    with GradNorms(model) as monitor:
        model(torch.ones(1, 3)).sum().backward()
        with pytest.raises(ConfigError, match="two samples"):
            _ = monitor.noise_scale


def test_an_instance_norm_in_evaluation_mode_takes_its_statistics_from_the_input():
    model, x = nn.InstanceNorm1d(3, affine=True).double().eval(), torch.randn(4, 3, 5, dtype=torch.double)
    expected = grads_one_by_one(model, squared_loss, [x])
    with GradNorms(model) as monitor:
        squared_loss(model, x).backward()
    torch.testing.assert_close(monitor.norms, sum(g.square().sum(1) for g in expected.values()).sqrt())


def test_norms_of_an_embedding_in_half_precision_are_added_up_in_float32():
    model, words = nn.Embedding(5000, 8, dtype=torch.bfloat16), torch.zeros(2, 300, dtype=torch.long)
    with GradNorms(model, "sum") as monitor:
        model(words).sum().backward()  # each of 8 elements is 300, of which bfloat16 would count 256
    assert monitor.norms.tolist() == pytest.approx([300 * 8**0.5] * 2, rel=1e-5)


def test_outliers_are_those_far_from_the_median_and_those_not_finite():
    model = nn.Linear(2, 1, bias=False)
    size = torch.tensor([1.0, 1.1, 30.0, 0.9, float("nan"), 1.05, 0.95, 40.0])
    with GradNorms(model, "sum") as monitor:
        model(size[:, None] * torch.tensor([1.0, 0.0])).sum().backward()
    assert monitor.outliers().tolist() == [4, 7, 2]
    assert monitor.outliers(factor=1e6).tolist() == [4]
    with pytest.raises(ConfigError, match="factor"):
        monitor.outliers(-1)


def test_an_outlier_is_more_than_so_many_deviations_above_the_median():
    norms = torch.tensor([2.0, 4.0, 6.0, 8.0, 20.0])  # median 6, and 2 of the distances from it
    assert outliers(norms, 7 / 1.483).tolist() == [4]
    assert outliers(norms, 7 / 1.482).tolist() == []
    assert outliers(norms, 0.0).tolist() == [4, 3]
    assert outliers(torch.tensor([torch.inf, torch.nan]), 1.0).tolist() == [0, 1]


def test_an_empty_batch_has_no_outliers():
    model = nn.Linear(3, 2)
    with GradNorms(model, "sum") as monitor:
        model(torch.zeros(0, 3)).sum().backward()
    assert monitor.outliers().tolist() == []


@pytest.mark.parametrize("change", ["none", "step", "zero", "gone", "scaled"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_noise_scale_of_gradients_that_changed_since(change, accumulated):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with GradNorms(model) as monitor:
        model(x).square().sum(1).mean().backward()
        expected = monitor.noise_scale.squared_norm
        if not accumulated:
            model.zero_grad()
        model(x).square().sum(1).mean().backward()
        if change == "step":
            optimizer.step()
        elif change in ("zero", "gone"):
            optimizer.zero_grad(set_to_none=change == "gone")
        elif change == "scaled":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if change in ("none", "step") or accumulated:
            torch.testing.assert_close(monitor.noise_scale.squared_norm, expected)
        else:
            with pytest.raises(ConfigError, match="ask before zero_grad"):
                _ = monitor.noise_scale


class Again(nn.Module):
    """Layers that are called as often as the model is told to, on rows of the same shape."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 6)
        self.times = 1

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.linear(self.conv(x)))
        return x.flatten(1)


def test_a_layer_that_is_called_once_more_counts_with_the_sum_of_its_calls():
    """Its first call is squared and added up at once, which must not be what counts; nor what is left."""
    torch.manual_seed(0)
    model, x = Again().double(), torch.randn(5, 4, 6, 6, dtype=torch.double)
    with GradNorms(model) as monitor:
        for times in (1, 3, 1, 2):
            model.times = times
            expected = grads_one_by_one(model, squared_loss, [x])
            ordinary = grads_one_by_one(model, squared_loss, [x], len(x))
            model.zero_grad()
            squared_loss(model, x).backward()
            norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
            torch.testing.assert_close(monitor.norms, norms)
            for path, p in model.named_parameters():
                torch.testing.assert_close(p.grad, ordinary[path][0])


@pytest.mark.parametrize("samples", [1, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("sizes", [(2, 40, 3), (6, 5, 4), (64, 3, 65)])  # the last two: by Gram matrices
def test_norms_and_sum_of_a_linear_layer(samples, bias, frozen, sizes):
    inputs, positions, outputs = sizes
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(inputs, outputs, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(positions * outputs, 2)
    )
    model = model.double()
    if frozen is not None and getattr(model[0], frozen) is not None:
        getattr(model[0], frozen).requires_grad_(False)
    x = torch.randn(inputs, positions, 2 * samples, dtype=torch.double).permute(2, 1, 0)[::2]
    expected = grads_one_by_one(model, squared_loss, [x])
    ordinary = grads_one_by_one(model, squared_loss, [x], len(x))
    with GradNorms(model) as monitor:
        squared_loss(model, x).backward()
    for layer in ("0", "3"):
        parts = [g.flatten(1).square().sum(1) for name, g in expected.items() if name.startswith(layer)]
        if parts:
            torch.testing.assert_close(monitor.per_layer[layer], torch.stack(parts).sum(0).sqrt())
    for path, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, ordinary[path][0])


def test_gradients_are_made_once(monkeypatch):
    """Of a layer with many positions, norms and sum come from the same gradients: no weighted sum follows."""
    monkeypatch.setattr(Linear, "weighted_sum", None)
    monkeypatch.setattr(Convolution, "weighted_sum", None)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(2), nn.Linear(100, 4), nn.Flatten())
    with GradNorms(model) as monitor:
        model(torch.randn(4, 3, 12, 12)).square().mean().backward()
    assert monitor.norms.shape == (4,)


def test_norms_by_layer_are_there_until_the_next_backward_pass():
    """Added up when they are asked for, of gradients that are gone by then."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 3)
    )
    x, y = torch.randn(8, 3, 8, 8), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, x, y):
        return nn.functional.mse_loss(model(x), y)

    with GradNorms(model) as monitor:
        for _ in range(2):
            expected = grads_one_by_one(model, loss, [x, y])
            loss(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert monitor.per_layer.keys() == {"0", "2", "4"}
            for path, norms in monitor.per_layer.items():
                parts = [
                    g.flatten(1).square().sum(1) for name, g in expected.items() if name.startswith(path)
                ]
                torch.testing.assert_close(norms, torch.stack(parts).sum(0).sqrt(), rtol=1e-4, atol=1e-6)
