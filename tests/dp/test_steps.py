"""P3, P5, P6 through the engine: one draw of noise and one accounted step to every move of the weights."""

import math

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from torch import nn, optim

from psgrad.clipping import AdaptiveQuantile, Automatic, PerLayer
from psgrad.dp import PrivacyEngine, noise_generator
from tests.dp.problems import backward, dataset, flat, loader_of, private, train
from tests.dp.test_sampling import in_parts


class Wide(nn.Module):
    """A million parameters and no gradient: what moves them is the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1000, 500, bias=False)
        self.second = nn.Linear(500, 1000, bias=False)

    def forward(self, x):
        return 0.0 * self.second(self.first(x))


def count_noise(bound: float) -> AdaptiveQuantile:
    return AdaptiveQuantile(bound, expected_batch_size=4, count_noise=3.0)


@pytest.mark.parametrize(
    ("style", "sigma"),
    [
        (0.7, 1.3),
        (Automatic(0.7), 1.3),
        (PerLayer({"first": 0.42, "second": 0.56}), 1.3),  # 0.42^2 + 0.56^2 = 0.7^2
        # Andrew et al. 2021, theorem 1: the count has its share
        (count_noise(0.7), (1.3**-2 - (2 * 3.0) ** -2) ** -0.5),
    ],
    ids=["flat", "automatic", "per layer", "adaptive"],
)
@pytest.mark.parametrize("parts", [1, 4])
def test_p3_noise_has_the_scale_of_the_bound_over_the_divisor(style, sigma, parts):
    model = Wide()
    before = flat(model)
    model, optimizer, _ = private(
        model=model,
        optimizer=lambda ps: optim.SGD(ps, lr=1.0),
        max_grad_norm=style,
        noise_multiplier=1.3,
        noise_generator=noise_generator(seed=3),
    )
    steps = []
    for _ in range(2):
        for x in torch.ones(4, 1000).chunk(parts):
            model(x).mean().backward()
        bound = optimizer.clip.l2_bound
        optimizer.step()
        steps.append((flat(model) - before) / bound)
        before = flat(model)
    std, draws = sigma / 4, 1_000_000
    first, second = steps
    for step in steps:
        # 4.9 standard deviations: one chance in a million
        assert abs(step.std().item() - std) < 4.9 * std / math.sqrt(2 * draws)
        assert abs(step.mean().item()) < 4.9 * std / math.sqrt(draws)
    half = draws // 2
    for left, right in ((first, second), (first[:half], first[half:]), (first[1:], second[:-1])):
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1].item()
        assert abs(correlation) < 4.9 / math.sqrt(len(left))


def test_p5_one_sample_more_changes_the_step_by_its_own_share_only():
    moved = []
    x, y = dataset(9)[:]
    for rows in (8, 9):
        model, optimizer, _ = private(
            optimizer=lambda ps: optim.SGD(ps, lr=1.0), noise_multiplier=0.0, max_grad_norm=0.01
        )
        before = flat(model)
        backward(model, x[:rows], y[:rows])
        optimizer.step()
        moved.append(flat(model) - before)
    assert (moved[1] - moved[0]).norm().item() == pytest.approx(0.01 / 4, rel=1e-4)


def independent(history) -> float:
    accountant = PLDAccountant()
    for sigma, rate, steps in history:
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps
        )
    return accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("mechanism", ["prv", "rdp"])
@pytest.mark.parametrize("style", [0.1, count_noise(0.1)], ids=["flat", "adaptive"])
def test_p6_what_is_reported_is_spent(monkeypatch, mechanism, style):
    """A partial pass, parts of batches, a discarded gradient and an empty batch; then another sigma."""
    import psgrad.dp.optimizer as module

    drawn = []
    real = module.add_gaussian_noise
    monkeypatch.setattr(module, "add_gaussian_noise", lambda *a: (drawn.append(a[1]), real(*a)))
    engine = PrivacyEngine(accountant=mechanism)
    model, optimizer, loader = private(
        engine, loader=loader_of(40, 4), max_grad_norm=style, noise_multiplier=1.1
    )
    moves = []
    optimizer.original_optimizer.register_step_post_hook(lambda *_: moves.append(1))
    for step, (x, y) in enumerate(loader):
        if step == 7:  # drawn, never released: costs nothing
            break
        backward(model, x, y)
        optimizer.step()
    train(model, optimizer, in_parts(loader, optimizer, 2).__enter__())
    backward(model, *dataset(3)[:])
    optimizer.zero_grad()  # thrown away, never released
    optimizer.step_empty()
    optimizer.noise_multiplier = 2.0
    train(model, optimizer, loader)
    assert engine.accountant.history == [(1.1, 0.1, 18), (2.0, 0.1, 10)]
    assert len(drawn) == len(moves) == 28
    # the gradients' noise is never below what the accountant was told
    assert all(own >= told for own, told in zip(drawn, [1.1] * 18 + [2.0] * 10, strict=True))
    epsilon = engine.get_epsilon(1e-5)
    assert epsilon >= independent(engine.accountant.history) - 0.02
    assert engine.get_epsilon(1e-5) == epsilon
    assert engine.accountant.history == [(1.1, 0.1, 18), (2.0, 0.1, 10)]


def test_p6_the_count_of_an_adaptive_bound_forgets_gradients_that_were_thrown_away():
    """Its sensitivity is 1/2 for samples that are counted once."""
    bounds = []
    for passes in (1, 3):
        style = AdaptiveQuantile(0.1, expected_batch_size=4, count_noise=0.0)
        model, optimizer, _ = private(noise_multiplier=0.0, max_grad_norm=style)
        for _ in range(passes):
            optimizer.zero_grad()
            backward(model, *dataset(5)[:])
        optimizer.step()
        bounds.append(optimizer.max_grad_norm)
    assert bounds[0] == bounds[1] != 0.1
