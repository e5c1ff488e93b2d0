"""P1, P2, P5, P6, P7: the private step as a whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from psgrad import ConfigError, clip_per_sample
from psgrad.dp import PrivateOptimizer, PRVAccountant, noise_generator


class Net(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.shared = shared

    def forward(self, x):
        x = F.relu_(self.norm(self.conv(x)))
        x = x + self.again(self.again(x)) if self.shared else self.again(x)
        return self.head(x.mean((2, 3)))


def make(sigma=0.0, bound=0.5, rows_per_sample=1, shared=True, expected=8.0, lr=1.0):
    torch.manual_seed(0)
    model = Net(shared)
    clip = clip_per_sample(model, bound, "sum", rows_per_sample=rows_per_sample)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr),
        clip,
        noise_multiplier=sigma,
        expected_batch_size=expected,
        accountant=PRVAccountant(),
        sample_rate=0.1,
        generator=noise_generator(seed=0),
    )
    return model, optimizer


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def clipped_sum(model, x, y, split, autocast=False):
    for p in model.parameters():
        p.grad = None
    for part in range(0, len(x), split):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(x[part : part + split])
        F.cross_entropy(logits.float(), y[part : part + split], reduction="sum").backward()
    return flat(p.grad for p in model.parameters())


@given(
    samples=st.integers(2, 7),
    rows_per_sample=st.integers(1, 3),
    split=st.integers(1, 7),
    bound=st.sampled_from([0.01, 0.5, 3.0]),
    scale=st.sampled_from([1.0, 1e4]),
    shared=st.booleans(),
    autocast=st.booleans(),
    removed=st.integers(0, 6),
)
def test_p1_one_sample_changes_the_sum_by_at_most_the_bound(
    samples, rows_per_sample, split, bound, scale, shared, autocast, removed
):
    model, optimizer = make(bound=bound, rows_per_sample=rows_per_sample, shared=shared)
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples * rows_per_sample, 2, 6, 6, generator=generator) * scale
    y = torch.randint(3, (samples * rows_per_sample,), generator=generator)
    gone = removed % samples
    keep = torch.arange(samples).repeat_interleave(rows_per_sample) != gone
    with_it = clipped_sum(model, x, y, split * rows_per_sample, autocast)
    without = clipped_sum(model, x[keep], y[keep], split * rows_per_sample, autocast)
    # clipping in float32 keeps the bound to 1e-5; the sums themselves round in the dtype of the layers
    slack = 1e-5 * bound + (0.01 if autocast else 1e-5) * with_it.norm()
    assert (with_it - without).norm() <= bound + slack
    optimizer.clip.remove()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_p2_a_sample_that_is_not_finite_contributes_nothing_and_is_counted(poison):
    model, optimizer = make(shared=False)
    x, y = torch.randn(4, 2, 6, 6), torch.randint(3, (4,))
    healthy = clipped_sum(model, x[1:], y[1:], split=4)
    x[0] = poison
    poisoned = clipped_sum(model, x, y, split=4)
    torch.testing.assert_close(poisoned, healthy)
    if poison != 1e38:
        assert optimizer.clip.result.non_finite.tolist() == [True, False, False, False]


def test_p5_the_divisor_is_a_constant():
    for size in (3, 8):
        model, optimizer = make()
        before = flat(model.parameters())
        total = clipped_sum(model, torch.randn(size, 2, 6, 6), torch.randint(3, (size,)), split=size)
        optimizer.step()
        torch.testing.assert_close(before - flat(model.parameters()), total / 8)


def test_p3_p6_one_draw_and_one_accounted_step_per_logical_step():
    steps = []
    for split in (8, 2):
        model, optimizer = make(sigma=1.0)
        x, y = torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
        without = flat(model.parameters()) - clipped_sum(model, x * 0, y * 0, split) / 8
        optimizer.step()
        steps.append(flat(model.parameters()) - without)
        assert optimizer.accountant.history == [(1.0, 0.1, 1)]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-6)  # the same noise, whatever the physical batches
    assert steps[0].std().item() == pytest.approx(1.0 * 0.5 / 8, rel=0.2)


def test_p4_an_empty_batch_is_a_step_of_noise():
    model, optimizer = make(sigma=1.0)
    before = flat(model.parameters())
    optimizer.step_empty()
    assert (flat(model.parameters()) != before).all()
    assert optimizer.accountant.history == [(1.0, 0.1, 1)]
    F.cross_entropy(model(torch.randn(0, 2, 6, 6)), torch.zeros(0, dtype=torch.long)).backward()  # NaN
    optimizer.step()
    assert flat(model.parameters()).isfinite().all()
    assert optimizer.accountant.history == [(1.0, 0.1, 2)]


def test_a_step_without_clipped_gradients_is_refused():
    model, optimizer = make()
    with pytest.raises(ConfigError, match="without a clipped gradient"):
        optimizer.step()
    model(torch.randn(3, 2, 6, 6)).sum().backward()
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match="without a clipped gradient"):
        optimizer.step()
    model(torch.randn(3, 2, 6, 6)).sum().backward()
    with pytest.raises(ConfigError, match="step_empty"):
        optimizer.step_empty()
    optimizer.step()
    assert optimizer.accountant.history == [(0.0, 0.1, 1)]


def test_frozen_parameters_get_neither_gradient_nor_noise():
    torch.manual_seed(0)
    model = Net(shared=False)
    model.conv.requires_grad_(False)
    before = copy.deepcopy(model.conv.state_dict())
    clip = clip_per_sample(model, 1.0, "sum")
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        clip,
        noise_multiplier=1.0,
        expected_batch_size=4,
        accountant=PRVAccountant(),
        sample_rate=0.1,
    )
    model(torch.randn(4, 2, 6, 6)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.conv.state_dict(), before, rtol=0, atol=0)


def test_p7_resumed_equals_uninterrupted():
    batches = [(torch.randn(5, 2, 6, 6), torch.randint(3, (5,))) for _ in range(4)]

    def run(model, optimizer, batches):
        for x, y in batches:
            clipped_sum(model, x, y, split=5)
            optimizer.step()

    whole, whole_optimizer = make()
    run(whole, whole_optimizer, batches)
    first, first_optimizer = make()
    run(first, first_optimizer, batches[:2])
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer = make()
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    run(second, second_optimizer, batches[2:])
    assert (flat(second.parameters()) == flat(whole.parameters())).all()
    assert second_optimizer.accountant.history == whole_optimizer.accountant.history == [(0.0, 0.1, 4)]


def test_p7_a_state_without_accountant_is_refused():
    _, optimizer = make()
    state = optimizer.state_dict()
    del state["accountant"]
    with pytest.raises(ConfigError, match="accountant"):
        optimizer.load_state_dict(state)


def test_what_would_not_be_private_is_refused():
    model = nn.Linear(2, 2)
    stranger = nn.Linear(3, 2)
    numbers = {
        "noise_multiplier": 1.0,
        "expected_batch_size": 4,
        "accountant": PRVAccountant(),
        "sample_rate": 0.1,
    }
    with clip_per_sample(model, 1.0, "mean") as clip, pytest.raises(ConfigError, match="sum"):
        PrivateOptimizer(torch.optim.SGD(model.parameters()), clip, **numbers)
    with clip_per_sample(model, 1.0, "sum") as clip:
        with pytest.raises(ConfigError, match="not clipped"):
            PrivateOptimizer(torch.optim.SGD([*model.parameters(), *stranger.parameters()]), clip, **numbers)
        for name in ("noise_multiplier", "expected_batch_size"):
            with pytest.raises(ConfigError, match=name):
                PrivateOptimizer(torch.optim.SGD(model.parameters()), clip, **numbers | {name: -1})
        for noise in (torch.inf, torch.nan):
            with pytest.raises(ConfigError, match="noise_multiplier must be finite"):
                PrivateOptimizer(
                    torch.optim.SGD(model.parameters()), clip, **numbers | {"noise_multiplier": noise}
                )
