"""The adaptive bound: its update by the paper's formula, its noise, where it ends, its share of sigma."""

import math

import pytest
import torch
from torch import nn

from psgrad import ConfigError, clip_per_sample
from psgrad.clipping import AdaptiveQuantile


def backward(model, sizes):
    """Per-sample gradient norms are exactly `sizes`."""
    model.zero_grad()
    (model(sizes[:, None])).sum().backward()


def test_the_update_is_the_paper_s():
    model = nn.Linear(1, 1, bias=False)
    style = AdaptiveQuantile(1.5, 4, quantile=0.25, learning_rate=0.3, count_noise=0)
    with clip_per_sample(model, style, "sum") as clip:
        backward(model, torch.tensor([1.0, 2.0]))  # two physical batches, one of three samples within 1.5
        backward(model, torch.tensor([3.0]))
        assert clip.take().l2_bound == 1.5
        fraction = 0.5 + (0.5 - 0.5 - 0.5) / 4
        assert clip.l2_bound == pytest.approx(1.5 * math.exp(-0.3 * (fraction - 0.25)))
        backward(model, torch.tensor([100.0]))
        assert model.weight.grad.item() == pytest.approx(clip.result.l2_bound)


@pytest.mark.parametrize(("start", "quantile"), [(5.0, 0.2), (0.01, 0.5), (0.01, 0.9)])
def test_the_bound_ends_at_the_quantile(start, quantile):
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    style = AdaptiveQuantile(start, 200, quantile=quantile)  # noise 10 on the count
    generator = torch.Generator().manual_seed(0)
    with clip_per_sample(model, style, "sum") as clip:
        for _ in range(150):
            backward(model, torch.rand(200))  # the quantile of uniform norms is itself
            clip.take(generator)
    assert clip.l2_bound == pytest.approx(quantile, rel=0.15)


def test_the_count_has_its_noise():
    generator = torch.Generator().manual_seed(0)
    style = AdaptiveQuantile(1.0, 100, quantile=0.5, learning_rate=1.0, count_noise=7.0)
    count = torch.tensor(20.0)
    logs = torch.tensor([math.log(style.after_step(count, generator).max_norm) for _ in range(20000)])
    assert logs.mean().item() == pytest.approx(-0.2, abs=4 * 0.07 / math.sqrt(20000))
    assert logs.std().item() == pytest.approx(0.07, rel=0.03)


def test_noise_without_a_generator_is_an_error_that_takes_nothing():
    model = nn.Linear(1, 1, bias=False)
    with clip_per_sample(model, AdaptiveQuantile(1.0, 4), "sum") as clip:
        backward(model, torch.tensor([1.0]))
        with pytest.raises(ConfigError, match="generator"):
            clip.take()
        assert clip.gathered.backward_passes == 1


@pytest.mark.parametrize("total", [0.5, 1.0, 4.0])
def test_gradients_and_count_together_cost_the_total(total):
    """Two Gaussian releases of sensitivity over deviation a and b are one of sqrt(a^2 + b^2)."""
    style = AdaptiveQuantile(1.0, 100, count_noise=5.0)
    of_gradients = style.gradient_noise_multiplier(total)
    assert of_gradients > total
    assert math.hypot(1 / of_gradients, 0.5 / 5.0) == pytest.approx(1 / total)


def test_a_count_that_costs_more_than_the_total_is_refused():
    with pytest.raises(ConfigError, match=r"above 0\.5"):
        AdaptiveQuantile(1.0, 100, count_noise=0.5).gradient_noise_multiplier(1.0)
    assert AdaptiveQuantile(1.0, 100, count_noise=0.0).gradient_noise_multiplier(0.0) == 0


def test_a_resumed_run_has_the_bound_of_the_interrupted_one():
    model = nn.Linear(1, 1, bias=False)
    style = AdaptiveQuantile(1.5, 4, count_noise=0)
    with clip_per_sample(model, style, "sum") as clip:
        backward(model, torch.tensor([1.0, 2.0, 3.0]))
        clip.take()
        saved = clip.state_dict()
    with clip_per_sample(model, style, "sum") as again:
        again.load_state_dict(saved)
        assert again.l2_bound == clip.l2_bound != 1.5
        with pytest.raises(ConfigError, match="max_norm"):
            again.load_state_dict({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"quantile": 1.5}, "quantile"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"count_noise": -1}, "count_noise"),
        ({"max_norm": math.inf}, "max_norm"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveQuantile(**{"max_norm": 1.0, "expected_batch_size": 4} | settings)
