"""What a graph of `torch.fx` leaves out of a forward pass, and members' folded run must not."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from psgrad import MemberError
from psgrad.ensemble import Ensemble


class Member(nn.Module):
    """Computes what it is told behind two layers, of which one counts for nothing at first."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.zeros(4))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.first(x))


def assert_as_alone(ens: Ensemble, x: Tensor) -> None:
    alone = torch.stack([ens.member(k)(x) for k in range(ens.members)])
    torch.testing.assert_close(ens(x), alone, rtol=1e-10, atol=1e-12)


def _aliased(self: Any, h: Tensor) -> Tensor:
    other = h
    other += self.gain * self.second(h)
    return h + other


def _aliased_before(self: Any, h: Tensor) -> Tensor:
    other = h
    other += 1
    h *= self.gain + 1
    return h + other


def _set(self: Any, h: Tensor) -> Tensor:
    h.data = h.data * (1 + self.gain)
    return h


def _viewed(self: Any, h: Tensor) -> Tensor:
    part = h[:, 1:]
    part -= self.gain[1:]
    return h * 2


def _without_rule(self: Any, h: Tensor) -> Tensor:
    other = h
    other //= self.gain + 1
    return h + other


def _number(self: Any, h: Tensor) -> Tensor:
    n = h.shape[1]
    m = n
    n += 1
    return h * n + self.gain * m


@pytest.mark.parametrize("compute", [_aliased, _aliased_before, _set, _viewed, _without_rule, _number])
@torch.no_grad()
def test_an_in_place_operator_reaches_every_name(compute: Any) -> None:
    ens = Ensemble.from_factory(lambda: Member(compute).double(), range(3), strategy="folded")
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_as_alone(ens, x)
    for parameter in ens.parameters():
        parameter.normal_()
    assert_as_alone(ens, x)


def test_an_in_place_sum_of_a_residual_block_folds() -> None:
    def block(self: Any, h: Tensor) -> Tensor:
        out = self.second(h)
        out += h
        return out.relu()

    ens = Ensemble.from_factory(lambda: Member(block), range(3), strategy="folded")
    assert ens.plan(torch.randn(5, 4)).refusal is None


def test_an_input_is_not_changed_by_what_changes_its_contiguous_copy() -> None:
    ens = Ensemble.from_factory(lambda: nn.Sequential(_Turned(), nn.ReLU(inplace=True)), range(3))
    x = torch.randn(3, 2, 5, 4)
    before = x.clone()
    ens.own(x)
    assert torch.equal(x, before)
    assert ens.plan(x, own=True).refusal is None


class _Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()


def test_masks_put_together_fold() -> None:
    ens = Ensemble.from_factory(
        lambda: Member(lambda self, h: h * ((h > 0) & (h < 1) | (h < -1))), range(3), strategy="folded"
    )
    x = torch.randn(5, 4)
    assert ens.plan(x).refusal is None
    torch.testing.assert_close(ens(x), torch.stack([ens.member(k)(x) for k in range(3)]))


@pytest.mark.parametrize("affine", [False, True])
def test_an_image_without_a_batch_axis_is_normalised_as_alone(affine: bool) -> None:
    ens = Ensemble.from_factory(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=affine)).double(),
        range(3),
        strategy="folded",
    )
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    assert_as_alone(ens, x)
    assert_as_alone(ens, x[0])
    ens(x)
    assert ens.execution.last_plan is not None
    assert ens.execution.last_plan.refusal is None


def test_an_axis_that_an_input_of_lower_rank_lacks_is_refused_as_alone() -> None:
    ens = Ensemble.from_factory(
        lambda: Member(lambda self, h: self.second(h).mean(2)), range(3), strategy="folded"
    )
    x = torch.randn(5, 6, 4)
    ens(x)
    with pytest.raises(IndexError, match="out of range"):
        ens(x[0])


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-20, 20)


@pytest.mark.parametrize("trained", [True, False])
def test_a_backward_pass_of_the_members_own_is_run(trained: bool) -> None:
    def build() -> nn.Module:
        member = Member(lambda self, h: self.second(_Clipped.apply(h)))
        return member.double().requires_grad_(trained)

    ens = Ensemble.from_factory(build, range(3), strategy="folded")
    x = torch.randn(5, 4, dtype=torch.float64)
    ens(x)
    x.requires_grad_()
    (100 * ens(x)).sum().backward()
    found, x.grad = x.grad, None
    for k in range(3):
        (100 * ens.member(k)(x)).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("draw", [lambda h: torch.randn(h.shape), lambda h: h[torch.randperm(h.shape[0])]])
def test_small_noise_drawn_from_a_shape_is_every_members_own(draw: Any) -> None:
    def build() -> nn.Module:
        return Member(lambda self, h: h + 1e-3 * draw(h))

    ens = Ensemble.from_factory(build, range(3), strategy="folded")
    x, state = torch.randn(6, 4), torch.get_rng_state()
    found = torch.stack([ens(x), ens(x)], 1)
    assert torch.equal(state, torch.get_rng_state())
    for k in range(3):
        torch.manual_seed(k)
        member = build()
        torch.testing.assert_close(found[k], torch.stack([member(x), member(x)]), rtol=1e-5, atol=1e-6)
    torch.set_rng_state(state)


class _Kind(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


@dataclass(frozen=True)
class _Frozen:
    """Has no hash, for all that it is frozen."""

    scales: list[float] = field(default_factory=lambda: [1.0])


SETTINGS: dict[str, tuple[Any, Callable[[nn.Module], None], Callable[[Any, Tensor], Tensor]]] = {
    "object": (SimpleNamespace(by=1.0), lambda m: setattr(m.held, "by", 2.0), lambda v, h: h * v.by),
    "objects": (
        [SimpleNamespace(a=SimpleNamespace(by=1.0))],
        lambda m: setattr(m.held[0].a, "by", 2.0),
        lambda v, h: h * v[0].a.by,
    ),
    "frozen": (_Frozen(), lambda m: m.held.scales.append(2.0), lambda v, h: h * v.scales[-1]),
    "function": (torch.relu, lambda m: setattr(m, "held", torch.tanh), lambda v, h: v(h)),
    "enum": (_Kind.PLAIN, lambda m: setattr(m, "held", _Kind.DOUBLE), lambda v, h: h * v.value),
    "set": ({1}, lambda m: m.held.add(2), lambda v, h: h * len(v)),
    "number": (np.float32(1), lambda m: setattr(m, "held", np.float32(2)), lambda v, h: h * float(v)),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_setting_that_changes_counts_however_it_is_held(kind: str) -> None:
    held, change, use = SETTINGS[kind]

    def build() -> nn.Module:
        member = Member(lambda self, h: use(self.held, h)).double()
        member.held = held
        return member

    ens = Ensemble.from_factory(build, range(2), strategy="folded")
    x = torch.randn(5, 4, dtype=torch.float64)
    before = ens(x)
    change(ens.stacked)
    assert_as_alone(ens, x)
    assert not torch.equal(ens(x), before)
    assert ens.execution.last_plan is not None
    assert ens.execution.last_plan.refusal is None


@pytest.mark.parametrize("strategy", ["auto", "folded"])
def test_a_setting_that_changes_every_step_keeps_few_graphs(strategy: Any) -> None:
    def build() -> nn.Module:
        member = Member(lambda self, h: h * self.held).double()
        member.held = 0.0
        return member

    ens = Ensemble.from_factory(build, range(3), strategy=strategy)
    x = torch.randn(5, 4, dtype=torch.float64)
    for step in range(12):
        ens.stacked.held = 1.0 + step
        assert_as_alone(ens, x)
    refusal = ens.plan(x).refusal
    assert refusal is None if strategy == "folded" else "settings change" in str(refusal)
    assert sum(map(len, ens.execution._graphs.values())) == 8
    assert ens.plan(x.float()[:, None].double()).refusal is None  # another kind of input


class _Shared:
    """One object in every copy of a member."""

    steps = 0

    def __deepcopy__(self, _: Any) -> _Shared:
        return self


def test_a_count_in_an_object_that_members_share_is_refused() -> None:
    held = _Shared()

    def compute(self: Any, h: Tensor) -> Tensor:
        self.held.steps += 1
        return h * self.held.steps

    def build() -> nn.Module:
        member = Member(compute)
        member.held = held
        return member

    with pytest.raises(MemberError, match="copies of the module share"):
        Ensemble.from_factory(build, range(3))(torch.randn(5, 4))


def _of_positive(self: Any, h: Tensor) -> Tensor:
    return torch.dropout(self.second(h), 0.5, self.training) * h[h > 0].sum()


def _twins(compute: Any) -> Ensemble:
    """Members alike in all but the gain, which is in the way of nothing."""
    ens = Ensemble.from_factory(lambda: nn.Sequential(nn.BatchNorm1d(4), Member(compute)), range(3))
    with torch.no_grad():
        for p in ens.parameters():
            p.copy_(p[:1].expand_as(p).clone())
    return ens


@pytest.mark.parametrize("called", [True, False])
def test_members_that_come_to_differ_in_sizes_run_one_after_the_other(called: bool) -> None:
    ens, x = _twins(_of_positive), torch.randn(5, 4)
    assert ens.plan(x).refusal is None
    ens(x)
    with torch.no_grad():
        ens.stacked[1].first.bias.copy_(torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 4))
    alone = [ens.member(k) for k in range(3)]
    states = [state.clone() for state in ens.randomness.states]
    found = ens(x) if called else ens.loss(lambda out, _: out.sum(), x, None)
    for k, member in enumerate(alone):
        with torch.random.fork_rng():
            torch.set_rng_state(states[k])
            expected = member(x)
        torch.testing.assert_close(found[k], expected if called else expected.sum())
        torch.testing.assert_close(ens.stacked[0].running_mean[k], member[0].running_mean)
    assert "differ in the shape" in str(ens.plan(x).refusal)


def test_results_of_different_sizes_are_refused_by_what_they_are() -> None:
    ens, x = _twins(lambda _, h: h[h > 0]), torch.randn(5, 4)
    ens(x)
    with torch.no_grad():
        ens.stacked[1].first.bias.copy_(torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 4))
    with pytest.raises(MemberError, match=r"different shapes.*ens\.loss"):
        ens(x)
    assert ens.loss(lambda out, _: out.mean(), x, None).shape == (3,)


def test_outputs_are_in_the_containers_of_the_member() -> None:
    class Returned(NamedTuple):
        out: Tensor
        more: Any

    def compute(_: Any, h: Tensor) -> Any:
        return Returned(h, OrderedDict(a=[h], b={"c": h + 1}, d=None, e=h.chunk(2, 1)))

    ens = Ensemble.from_factory(lambda: Member(compute), range(3), strategy="folded")
    x = torch.randn(5, 4)
    assert ens.plan(x).refusal is None
    found = ens(x)
    assert isinstance(found, Returned)
    kinds = [type(value) for value in (found.more, *found.more.values())]
    assert kinds == [OrderedDict, list, dict, type(None), tuple]
    assert found.more["e"][1].shape == (3, 5, 2)
    found.more["b"]["more"] = found.more["a"].pop()


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_inference_mode_is_as_good_as_no_grad(strategy: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())

    ens, other = (Ensemble.from_factory(build, range(3), strategy=strategy) for _ in range(2))
    x = torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        found = ens(x), ens.predict(x).mean
    with torch.no_grad():
        expected = other(x), other.predict(x).mean
    assert all(map(torch.equal, found, expected))
    for both in (ens, other):
        both.loss(lambda out, _: out.square().mean(), x, None).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ens.parameters(), other.parameters(), strict=True))


def _hook(module: nn.Module) -> Callable[[], None]:
    return module.register_forward_hook(lambda _, __, out: 2 * out).remove


def _hook_of_all(_: nn.Module) -> Callable[[], None]:
    return register_module_forward_hook(lambda m, _, out: 2 * out if type(m) is nn.Linear else None).remove


def _forward(module: nn.Module) -> Callable[[], None]:
    module.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), module)
    return lambda: delattr(module, "forward")


@pytest.mark.parametrize("alter", [_hook, _hook_of_all, _forward])
def test_what_a_layer_is_made_to_do_later_is_done(alter: Callable[[nn.Module], Callable[[], None]]) -> None:
    ens = Ensemble.from_factory(lambda: nn.Sequential(nn.Linear(4, 3)), range(3), strategy="folded")
    x = torch.randn(5, 4)
    before = ens(x)
    restore = alter(ens.stacked[0])
    try:
        torch.testing.assert_close(ens(x), 2 * before)
    finally:
        restore()
    assert torch.equal(ens(x), before)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_a_reentrant_checkpoint_is_refused(strategy: Any) -> None:
    def compute(self: Any, h: Tensor) -> Tensor:
        return checkpoint(lambda z: z * self.gain, h, use_reentrant=True)

    ens = Ensemble.from_factory(lambda: Member(compute), range(3), strategy=strategy)
    x = torch.randn(3, 4)  # as many samples as members: what runs again would not notice
    with pytest.raises(MemberError, match="use_reentrant=False"):
        ens(x)
    with pytest.raises(MemberError, match="use_reentrant=False"):
        ens.loss(lambda out, _: out.sum(), x, None)
