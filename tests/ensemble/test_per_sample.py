"""`clip_per_sample` on an ensemble: every member clipped as if it were alone, to one sample at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import psgrad
from psgrad.ensemble import Ensemble
from tests.ensemble.per_sample_cases import (
    CASES,
    FOLDED,
    NOT_ONE_BY_ONE,
    K,
    clipped,
    criterion,
    data,
    median_norm,
    one_at_a_time,
)

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ONE_BY_ONE])
def test_every_member_is_clipped_as_one_sample_at_a_time_alone(name: str, own: bool, reduction: str) -> None:
    fn, make = CASES[name]
    ens = Ensemble.from_factory(fn, range(10, 10 + K), strategy="folded")
    x, y = data(make, K, 5, own)
    max_norm = median_norm(ens, x, y, own)
    result = clipped(ens, x, y, own, max_norm, reduction)
    assert result.norms.shape == result.factors.shape == (K, 5)
    assert result.clipped.any()
    assert not result.clipped.all()
    for k in range(K):
        expected, norms = one_at_a_time(ens, k, x[k] if own else x, y[k] if own else y, max_norm, reduction)
        torch.testing.assert_close(result.norms[k], norms, rtol=1e-10, atol=1e-12)
        for path, p in ens.stacked.named_parameters():
            assert (p.grad is not None) == (path in expected), path
            if p.grad is not None:
                torch.testing.assert_close(p.grad[k], expected[path], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_captured_folded_is(name: str) -> None:
    fn, make = CASES[name]
    ens = Ensemble.from_factory(fn, range(K), strategy="folded")
    x, _ = data(make, K, 5, False)
    with psgrad.clip_per_sample(ens, 1.0):
        ens(x)
        plan = ens.execution.last_plan
    assert plan is not None
    assert (plan.refusal is None) == (name in FOLDED), plan


@pytest.mark.parametrize("style", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("samples", [0, 1, 5])
@pytest.mark.parametrize("members", [1, K])
@pytest.mark.parametrize("strategy", ["folded", "loop"])
@pytest.mark.parametrize("name", ["convolutions", "tied and frozen", "called twice", *NOT_ONE_BY_ONE])
def test_grad_is_what_the_handle_gives_the_member_alone(
    name: str, strategy: str, members: int, samples: int, style: str
) -> None:
    fn, make = CASES[name]
    for own in (False, True):
        ens = Ensemble.from_factory(fn, range(members), strategy=strategy)
        x, y = data(make, members, samples, own)
        streams = copy.deepcopy(ens.randomness)
        result = clipped(ens, x, y, own, 0.3, "mean", style=style)
        for k in range(members):
            alone = ens.member(k)
            with psgrad.clip_per_sample(alone, 0.3, style=style) as handle, streams.of(k):
                criterion("mean")(alone(x[k] if own else x), y[k] if own else y).backward()
            torch.testing.assert_close(result.norms[k], handle.result.norms)
            torch.testing.assert_close(result.factors[k], handle.result.factors)
            for (path, p), q in zip(ens.stacked.named_parameters(), alone.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), path
                if p.grad is not None and q.grad is not None:
                    torch.testing.assert_close(p.grad[k], q.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_rows_of_one_sample_are_clipped_together(strategy: str, own: bool) -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    x, y = data(make, K, 6, own)
    result = clipped(ens, x, y, own, 0.3, "mean", rows_per_sample=2)
    assert result.norms.shape == (K, 3)
    for k in range(K):
        alone = ens.member(k)
        with psgrad.clip_per_sample(alone, 0.3, rows_per_sample=2) as handle:
            criterion("mean")(alone(x[k] if own else x), y[k] if own else y).backward()
        torch.testing.assert_close(result.norms[k], handle.result.norms)
        for p, q in zip(ens.stacked.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad[k], q.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_under_autocast(strategy: str) -> None:
    torch.set_default_dtype(torch.float32)
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    x, y = data(make, K, 5, False)
    with psgrad.clip_per_sample(ens, 0.3) as handle:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ens(x)
        assert out.dtype == torch.bfloat16
        sum(F.cross_entropy(each.float(), y) for each in out).backward()
    for k in range(K):
        expected, norms = one_at_a_time(ens, k, x, y, 0.3, "mean")
        torch.testing.assert_close(handle.result.norms[k], norms, rtol=3e-2, atol=0)
        for path, p in ens.stacked.named_parameters():
            assert p.grad.dtype == torch.float32
            assert (p.grad[k] - expected[path]).norm() <= 3e-2 * expected[path].norm() + 3e-3


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_under_a_checkpoint_from_the_first_batch_on(strategy: str) -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    x, y = data(make, K, 5, False)
    with psgrad.clip_per_sample(ens, 0.3) as handle:
        outputs = checkpoint(ens, x.requires_grad_(), use_reentrant=False)
        sum(F.cross_entropy(out, y) for out in outputs).backward()
    for k in range(K):
        expected, norms = one_at_a_time(ens, k, x.detach(), y, 0.3, "mean")
        torch.testing.assert_close(handle.result.norms[k], norms)
        torch.testing.assert_close(ens.stacked[0].weight.grad[k], expected["0.weight"])


def test_an_infinite_bound_gives_the_ordinary_gradient() -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy="folded")
    x, y = data(make, K, 5, False)
    plain = copy.deepcopy(ens)
    plain.loss(F.cross_entropy, x, y).sum().backward()
    clipped(ens, x, y, False, float("inf"))
    for p, q in zip(ens.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("where", ["member", "sample"])
@pytest.mark.parametrize("strategy", ["folded", "loop"])
@pytest.mark.parametrize("name", ["convolutions", "transposed", "wide", "called twice"])
def test_what_is_not_finite_stays_where_it_is_bitwise(name: str, strategy: str, where: str) -> None:
    fn, make = FOLDED[name]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    other = copy.deepcopy(ens)
    x, y = data(make, K, 4, True)
    before = clipped(ens, x, y, True, 0.3)
    bad = x.clone()
    bad[1, 2 if where == "sample" else slice(None)] = float("nan")
    after = clipped(other, bad, y, True, 0.3)
    assert after.non_finite.sum() == (1 if where == "sample" else 4)
    assert after.non_finite[1, 2]
    for k in (0, 2):
        assert torch.equal(before.norms[k], after.norms[k])
    for p, q in zip(ens.parameters(), other.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            assert torch.equal(p.grad[[0, 2]], q.grad[[0, 2]])
            assert q.grad.isfinite().all()


class _Counted(torch.nn.Module):
    """Looks at how many of its inputs are positive, and makes nothing of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 * (x.detach() > 0).nonzero().sum()


def test_members_that_come_to_differ_in_sizes_are_clipped_one_after_the_other() -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 3), _Counted())

    ens = Ensemble.from_factory(build, range(K), strategy="folded")
    with torch.no_grad():
        for p in ens.parameters():
            p.copy_(p[:1].expand_as(p).clone())
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with psgrad.clip_per_sample(ens, max_norm=0.1):
        for folded in (True, False):
            ens.zero_grad()
            ens.loss(F.cross_entropy, x, y).sum().backward()
            assert (ens.execution.last_plan.refusal is None) == folded
            for k in range(K):
                member = ens.member(k)
                with psgrad.clip_per_sample(member, max_norm=0.1):
                    F.cross_entropy(member(x), y).backward()
                for p, q in zip(ens.parameters(), member.parameters(), strict=True):
                    torch.testing.assert_close(p.grad[k], q.grad)
            with torch.no_grad():
                for p in ens.parameters():
                    p.copy_(torch.linspace(-2, 2, p.numel()).view_as(p))
