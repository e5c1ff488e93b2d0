"""The comparison of whole models must be able to say wrong, and to say what was raised."""

import pytest
import torch

from psgrad import PerSampleGrads
from psgrad.bench.model_gradients import _judge, compare
from psgrad.bench.zoo import build, classification_loss, replace_batch_norm, still_random_modules, wake


@pytest.fixture
def judged():
    torch.manual_seed(0)
    model = still_random_modules(wake(build("squeezenet1_1"))).double()
    images, labels = torch.randn(2, 3, 64, 64, dtype=torch.double), torch.tensor([1, 7])
    with PerSampleGrads(model):
        classification_loss(model, images, labels).backward()
    return model, images, labels


def test_right(judged):
    outcome = _judge(*judged)
    assert outcome.verdict == "right"
    assert outcome.error < 1e-12


@pytest.mark.parametrize("factor", [1.5, 1 + 1e-6, float("nan")])
def test_a_wrong_gradient_is_wrong(judged, factor):
    p = judged[0].classifier[1].bias
    p.grad_sample[1] *= factor
    outcome = _judge(*judged)
    assert (outcome.verdict, outcome.wrong) == ("wrong", 1)


def test_samples_in_another_order_are_wrong(judged):
    for p in judged[0].parameters():
        p.grad_sample = p.grad_sample.flip(0)
    assert _judge(*judged).wrong == len(list(judged[0].parameters()))


def test_a_missing_gradient_is_wrong(judged):
    judged[0].classifier[1].bias.grad_sample = None
    assert _judge(*judged).verdict == "wrong"


def test_what_a_contender_raises_is_its_outcome():
    outcome = compare("squeezenet1_1", "Opacus")
    assert outcome.verdict == "raises"
    assert "inplace" in outcome.reason
    assert compare("squeezenet1_1", "Opacus, no in-place flags").verdict == "right"


def test_only_batch_norm_is_replaced():
    from torch import nn

    model = nn.ModuleDict({"a": nn.BatchNorm2d(48), "b": nn.MultiheadAttention(4, 2), "c": nn.LSTM(2, 2)})
    kept = (model["b"], model["c"])
    replace_batch_norm(model)
    assert isinstance(model["a"], nn.GroupNorm)
    assert (model["b"], model["c"]) == kept
