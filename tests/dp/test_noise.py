"""P3: the noise's scale, independence and source."""

import math

import pytest
import torch
from torch import nn

from psgrad import ConfigError
from psgrad.dp import add_gaussian_noise, noise_generator


def zero_grads(*shapes):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters


def test_scale_over_a_million_draws():
    (p,) = zero_grads((1_000_000,))
    add_gaussian_noise([p], noise_multiplier=1.3, l2_bound=0.7, generator=noise_generator(seed=0))
    std = 1.3 * 0.7
    # the sample deviation of n draws is normal about sigma with deviation sigma / sqrt(2 n); 4.9 of them
    # leave one chance in a million
    assert abs(p.grad.std().item() - std) < 4.9 * std / math.sqrt(2e6)
    assert abs(p.grad.mean().item()) < 4.9 * std / math.sqrt(1e6)


def test_parameters_and_steps_are_independent():
    first, second = zero_grads((200_000,), (200_000,))
    generator = noise_generator(seed=1)
    add_gaussian_noise([first, second], 1.0, 1.0, generator)
    a, b = first.grad.clone(), second.grad.clone()
    first.grad.zero_()
    add_gaussian_noise([first], 1.0, 1.0, generator)
    for left, right in [(a, b), (a, first.grad), (b, first.grad)]:
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1].item()
        assert abs(correlation) < 4.9 / math.sqrt(200_000)


def test_a_parameter_without_gradient_gets_noise():
    p = nn.Parameter(torch.zeros(10))
    add_gaussian_noise([p], 1.0, 1.0, noise_generator())
    assert p.grad.all()


def test_unseeded_generators_never_agree():
    draws = [torch.rand(4, generator=noise_generator()) for _ in range(8)]
    assert len({tuple(d.tolist()) for d in draws}) == 8


def test_half_precision_parameters():
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    add_gaussian_noise([p], 2.0, 1.0, noise_generator(seed=0))
    assert p.grad.dtype == torch.bfloat16
    assert p.grad.float().std().item() == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(("multiplier", "bound"), [(-1, 1), (float("nan"), 1), (1, float("inf")), (1, 0)])
def test_numbers_that_give_no_privacy_are_refused(multiplier, bound):
    with pytest.raises(ConfigError):
        add_gaussian_noise(zero_grads((2,)), multiplier, bound, noise_generator())
