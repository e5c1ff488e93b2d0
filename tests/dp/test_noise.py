"""P3: the noise's scale, independence and source."""

import math

import pytest
import torch
from torch import nn

from psgrad import ConfigError
from psgrad.dp import add_gaussian_noise, noise, noise_generator, streams
from psgrad.dp.noise import CHUNK
from psgrad.dp.streams import stream


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


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_parameters_of_no_axis_and_of_no_element(shape):
    p = nn.Parameter(torch.zeros(shape))
    add_gaussian_noise([p], 1.0, 1.0, noise_generator())
    assert p.grad.shape == p.shape
    assert p.grad.all()


def test_unseeded_generators_never_agree():
    draws = [torch.rand(4, generator=noise_generator()) for _ in range(8)]
    assert len({tuple(d.tolist()) for d in draws}) == 8


def test_no_seed_leads_to_an_unseeded_stream():
    """Of a seed, PyTorch's generator on the CPU takes 32 bits: they could all be tried."""
    own = noise_generator()
    drawn = torch.rand(4, generator=own)
    again = torch.rand(4, generator=torch.Generator().manual_seed(own.initial_seed()))
    assert not torch.equal(drawn, again)
    words = own.get_state()[24 : 24 + 8 * 624].view(torch.int64)
    # 4.9 standard deviations: one chance in a million
    assert abs(words.bitwise_and(1).double().mean().item() - 0.5) < 4.9 * 0.5 / math.sqrt(624)
    assert words.unique().numel() > 600


def test_every_word_of_a_state_counts():
    words = torch.randint(2**32, (624,))
    drawn = torch.rand(2000, generator=stream(words))
    torch.testing.assert_close(torch.rand(2000, generator=stream(words)), drawn, rtol=0, atol=0)
    for i in (1, 300, 623):
        other = words.clone()
        other[i] ^= 2**31
        assert not torch.equal(torch.rand(2000, generator=stream(other)), drawn)


def noise_of(shape, seed=0, memory_format=torch.contiguous_format, dtype=torch.float32):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    p.grad = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
    add_gaussian_noise([p], 2.0, 1.5, noise_generator(seed=seed))
    assert p.grad.is_contiguous(memory_format=memory_format)
    return p.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_noise_in_parts_is_all_drawn_anew(memory_format, dtype):
    shape = (3, CHUNK // 3 + 7, 2, 1)
    drawn = noise_of(shape, memory_format=memory_format, dtype=dtype).double().flatten()
    assert abs(drawn.std().item() - 3.0) < 4.9 * 3.0 / math.sqrt(2 * drawn.numel()) + 0.01
    first, second = drawn[: CHUNK // 2], drawn[-(CHUNK // 2) :]
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 4.9 / math.sqrt(CHUNK // 2)
    assert dtype == torch.bfloat16 or drawn.unique().numel() > 0.95 * drawn.numel()


def test_noise_in_parts_is_drawn_in_the_order_of_memory():
    shape = (3, CHUNK // 3 + 7, 2, 1)
    last = noise_of(shape, memory_format=torch.channels_last)
    assert torch.equal(last.movedim(1, -1).flatten(), noise_of(shape).flatten())


@pytest.mark.parametrize(
    "grad",
    [torch.zeros(2 * CHUNK + 6)[::2], torch.zeros(600, CHUNK // 300).mT, torch.zeros(700, 800)[:, ::2]],
)
def test_a_gradient_with_gaps_or_in_another_order_gets_noise_everywhere(grad):
    p = nn.Parameter(torch.zeros(grad.shape))
    p.grad = grad
    add_gaussian_noise([p], 1.0, 1.0, noise_generator(seed=0))
    assert int(p.grad.count_nonzero()) >= CHUNK


def test_how_many_threads_there_are_does_not_matter_to_seeded_noise():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(noise_of((3 * CHUNK + 5,), seed=4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], noise_of((3 * CHUNK + 5,), seed=5))


def test_words_that_lie_elsewhere_in_the_state_are_noticed(monkeypatch):
    assert streams.is_known.__wrapped__()
    monkeypatch.setattr(streams, "_PLACE", slice(32, 32 + 8 * streams.WORDS))
    assert not streams.is_known.__wrapped__()


def test_a_state_that_is_kept_in_another_way_gives_no_weak_noise(monkeypatch):
    monkeypatch.setattr(noise, "is_known", lambda: False)
    with pytest.raises(ConfigError, match="32 bits"):
        noise_generator()
    assert noise_of((CHUNK + 1,)).std().item() == pytest.approx(3.0, rel=0.02)  # in one piece


def test_without_noise_no_bound_is_needed():
    (p,) = zero_grads((3,))
    add_gaussian_noise([p], 0.0, math.inf, noise_generator())
    assert not p.grad.any()


def test_half_precision_parameters():
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    add_gaussian_noise([p], 2.0, 1.0, noise_generator(seed=0))
    assert p.grad.dtype == torch.bfloat16
    assert p.grad.float().std().item() == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(("multiplier", "bound"), [(-1, 1), (float("nan"), 1), (1, float("inf")), (1, 0)])
def test_numbers_that_give_no_privacy_are_refused(multiplier, bound):
    with pytest.raises(ConfigError):
        add_gaussian_noise(zero_grads((2,)), multiplier, bound, noise_generator())
