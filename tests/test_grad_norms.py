"""Norms of every sample beside the ordinary gradient, on the models of the capture tests."""

import pytest
import torch
from torch import nn

from psgrad import ConfigError, GradNorms
from tests.model_oracle import grads_one_by_one, squared_loss
from tests.test_capture import MODELS, make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_per_sample", [1, 3])
def test_norms_and_ordinary_gradient_of_every_model(name, rows_per_sample):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    ordinary = grads_one_by_one(model, squared_loss, [x], len(x))
    with GradNorms(model, rows_per_sample=rows_per_sample) as monitor:
        squared_loss(model, x).backward()
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
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
    with GradNorms(model) as monitor:
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
