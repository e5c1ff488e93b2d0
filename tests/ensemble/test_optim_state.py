"""State of the ensemble's optimizers: keep, save and load; and clipping."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, SequentialLR, StepLR

from psgrad import ConfigError, MemberError
from psgrad.ensemble import SGD, Adam, AdamW, Ensemble, PerMember, clip_grad_norm_
from tests.ensemble.test_optim import CASES, K, fit, start

RATES = [0.05, 0.01, 0.02]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def train(ens: Ensemble, optimizer: Any, schedule: Any, steps: int, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        ens.loss(F.cross_entropy, x, y).sum().backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("first", ["ensemble", "optimizer"])
@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (SGD, {"momentum": [0.9, 0.5, 0.7], "weight_decay": [0.0, 0.1, 0.2]}),
        (Adam, {"betas": (0.9, [0.99, 0.9, 0.95]), "amsgrad": True}),
        (AdamW, {"betas": ([0.9, 0.8, 0.7], 0.99)}),
    ],
)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: CosineAnnealingLR(o, 10, eta_min=1e-3),
        lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o: SequentialLR(o, [StepLR(o, 2), LambdaLR(o, lambda t: 1 / (1 + t))], [3]),
    ],
    ids=["cosine", "lambda", "sequential"],
)
def test_kept_members_go_on_as_if_nothing_had_been(ours, options, schedule, first: str) -> None:
    ens = Ensemble.from_factory(model, range(K))
    optimizer = ours(ens.parameters(), lr=RATES, **options)
    schedules = schedule(optimizer)
    train(ens, optimizer, schedules, 5)
    whole, whole_optimizer, whole_schedules = copy.deepcopy((ens, optimizer, schedules))
    train(whole, whole_optimizer, whole_schedules, 5, 5)
    for what in ("ensemble", "optimizer") if first == "ensemble" else ("optimizer", "ensemble"):
        if what == "ensemble":
            ens.keep([2, 0])
        else:
            optimizer.keep([2, 0], schedules)
    assert optimizer.members == 2
    train(ens, optimizer, schedules, 5, 5)
    for p, all_of_them in zip(ens.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, all_of_them[[2, 0]], rtol=1e-12, atol=1e-14)


def test_keep_on_one_of_the_two_is_an_error() -> None:
    for forgotten in ("optimizer", "ensemble"):
        ens = Ensemble.from_factory(model, range(K))
        optimizer = SGD(ens.parameters(), lr=RATES, momentum=0.9)
        schedule = LambdaLR(optimizer, lambda t: 1.0)
        (ens if forgotten == "optimizer" else optimizer).keep([1])
        with pytest.raises(MemberError, match="call keep with the same indices on both"):
            train(ens, optimizer, schedule, 1)


def test_a_schedule_that_keep_was_not_given_is_an_error() -> None:
    ens = Ensemble.from_factory(model, range(K))
    optimizer = SGD(ens.parameters(), lr=RATES)
    schedule = LambdaLR(optimizer, lambda t: 1.0)
    ens.keep([1])
    optimizer.keep([1])
    train(ens, optimizer, schedule, 1)
    with pytest.raises(ConfigError, match="give keep the schedulers too"):
        train(ens, optimizer, schedule, 1)


@pytest.mark.parametrize("indices", [[], [0, 0], [3], [-1]])
def test_members_that_are_none_cannot_be_kept(indices: list[int]) -> None:
    with pytest.raises(MemberError, match="different members of 0 to 2"):
        SGD(start(), lr=0.1).keep(indices)


@pytest.mark.parametrize(("ours", "options"), CASES)
def test_saved_and_loaded_it_goes_on_bitwise(ours: type, options: dict[str, Any]) -> None:
    stacked = start()
    optimizer = ours(stacked, **options)
    schedule = StepLR(optimizer, 2)
    fit(stacked, optimizer, schedule, 5)
    file = io.BytesIO()
    torch.save({"o": optimizer.state_dict(), "s": schedule.state_dict(), "p": stacked}, file)
    fit(stacked, optimizer, schedule, 5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = [p.detach().requires_grad_() for p in saved["p"]]
    again = ours(other, lr=0.7)
    again_schedule = StepLR(again, 2)
    again.load_state_dict(saved["o"])
    again_schedule.load_state_dict(saved["s"])
    fit(other, again, again_schedule, 5)
    for a, b in zip(stacked, other, strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_members_is_refused() -> None:
    state = SGD([torch.ones(2, 3)], lr=0.1).state_dict()
    with pytest.raises(MemberError, match="of 2 members, the optimizer has 3"):
        SGD([torch.ones(3, 3)], lr=0.1).load_state_dict(state)
    with pytest.raises(MemberError, match="of no members"):
        SGD([torch.ones(3, 3)], lr=0.1).load_state_dict(torch.optim.SGD([torch.ones(3, 3)]).state_dict())


@pytest.mark.parametrize("max_norm", [0.5, [0.1, 1e9, 2.0]])
def test_every_member_is_clipped_as_alone(max_norm: Any) -> None:
    stacked = [*start(), torch.ones(K, 2)]  # one without gradient
    for i, p in enumerate(stacked[:3]):
        p.grad = p.detach() * (i + 1)
    alone = [[p.detach()[k].clone() for p in stacked[:3]] for k in range(K)]
    norms = clip_grad_norm_(stacked, max_norm)
    assert norms.shape == (K,)
    for k in range(K):
        for i, p in enumerate(alone[k]):
            p.grad = p * (i + 1)
        limit = max_norm[k] if isinstance(max_norm, list) else max_norm
        expected = torch.nn.utils.clip_grad_norm_(alone[k], limit)
        torch.testing.assert_close(norms[k], expected, rtol=1e-12, atol=0)
        for p, q in zip(stacked[:3], alone[k], strict=True):
            torch.testing.assert_close(p.grad[k], q.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_clipping_one_member_touches_no_other_bitwise(value: float) -> None:
    def run(first: float) -> tuple[Tensor, Tensor]:
        p = torch.ones(K, 5, requires_grad=True)
        p.grad = torch.arange(15.0).reshape(K, 5)
        p.grad[1, 2] = first
        return clip_grad_norm_(p, 0.3), p.grad

    for before, after in zip(run(1.0), run(value), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])


def test_clipping_nothing_and_badly() -> None:
    assert torch.equal(clip_grad_norm_([torch.ones(K, 2)], 1.0), torch.zeros(K))
    with pytest.raises(MemberError, match="one K, got"):
        clip_grad_norm_([], 1.0)
    with pytest.raises(MemberError, match="one K, got"):
        clip_grad_norm_([torch.ones(2), torch.ones(3)], 1.0)
    with pytest.raises(ConfigError, match="max_norm must not be negative"):
        clip_grad_norm_([torch.ones(2)], -1.0)
    with pytest.raises(ConfigError, match="max_norm has 3 values"):
        clip_grad_norm_([torch.ones(2)], [1.0, 1.0, 1.0])


def test_per_member_arithmetic_is_of_the_single_numbers() -> None:
    a, b = PerMember([1.0, 2.0]), PerMember([4.0, 0.5])
    assert (a + b, a - b, a * b, a / b) == tuple(
        map(PerMember, ([5.0, 2.5], [-3.0, 1.5], [4.0, 1.0], [0.25, 4.0]))
    )
    assert (1 - a, 2 / a, a**2, -a, 3 + a) == tuple(
        map(PerMember, ([0.0, -1.0], [2.0, 1.0], [1.0, 4.0], [-1.0, -2.0], [4.0, 5.0]))
    )
    assert f"{a:.1f}" == "[1.0, 2.0]"
    assert a != b
    assert hash(a) == hash(PerMember([1, 2]))
    with pytest.raises(MemberError, match="of 2 and of 3"):
        a + PerMember([1.0, 2.0, 3.0])
    with pytest.raises(TypeError):
        a + "1"
