"""Nothing that one member's forward pass does reaches another, in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad import MemberError, ShapeError
from psgrad.ensemble import Ensemble

pytestmark = pytest.mark.usefixtures("double")
K = 3
STRATEGIES = ["folded", "loop", "auto"]


class Headed(nn.Module):
    """A linear layer, and what a test makes of it: `how(self, x)`."""

    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.how = how
        self.n, self.log = 0, []
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("late", None)

    def forward(self, x: Any) -> Any:
        return self.how(self, x)


def ensemble(how: Callable[[Any, Any], Any], strategy: str = "auto", members: int = K) -> Ensemble:
    return Ensemble.from_factory(lambda: Headed(how), range(members), strategy=strategy)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randint(0, 3, (5,))


def without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.tanh(self.trunk(x))
    return self.head(z)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trunk_without_gradient_is_not_trained_behind_a_head_of_zeros(strategy: str) -> None:
    ens = ensemble(without_gradient, strategy)
    with torch.no_grad():
        for p in ens.stacked.head.parameters():
            p.zero_()
    x, y = data()
    for _ in range(2):
        ens.loss(F.cross_entropy, x, y).sum().backward()
    assert ens.stacked.trunk.weight.grad is None
    assert ens.plan(x).refusal is not None


def test_a_gradient_of_zeros_is_not_none_to_the_check() -> None:
    ens = ensemble(
        lambda self, x: self.head(self.trunk(x).detach() if isinstance(x, Tensor) else self.trunk(x))
    )
    nn.init.zeros_(ens.stacked.head.weight)
    assert "gradient" in str(ens.plan(data()[0]).refusal)


def sets_tensor(self: Any, x: Tensor) -> Tensor:
    self.n = self.trunk(x).detach()
    return self.head(self.n)


def counts(self: Any, x: Tensor) -> Tensor:
    self.n += 1
    return self.head(self.trunk(x)) * self.n


def appends(self: Any, x: Tensor) -> Tensor:
    self.log.append(len(x))
    return self.head(self.trunk(x))


def branches_and_counts(self: Any, x: Tensor) -> Tensor:
    return counts(self, x) if self.mean.sum() < 1 else x


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("how", "name"), [(sets_tensor, "n"), (counts, "n"), (appends, "log"), (branches_and_counts, "n")]
)
def test_plain_state_set_in_forward_is_refused_by_path(how: Any, name: str, strategy: str) -> None:
    x, y = data()
    ens = Ensemble.from_factory(lambda: nn.Sequential(Headed(how)), range(K), strategy=strategy)
    with pytest.raises(MemberError, match=rf"0\.{name}\b.*buffer"):
        ens(x)
    with pytest.raises(MemberError, match=rf"0\.{name}\b.*buffer"):
        ens.loss(F.cross_entropy, x, y)


def test_one_member_keeps_its_plain_state() -> None:
    ens = ensemble(counts, members=1)
    x, _ = data()
    assert torch.allclose(ens(x) * 2, ens(x))


def test_one_member_that_is_folded_does_not_freeze_its_plain_state() -> None:
    with pytest.raises(MemberError, match="attribute n"):
        ensemble(counts, "folded", members=1)(data()[0])


def divides(self: Any, x: Tensor) -> Tensor:
    return self.head(self.trunk(x.div_(255.0)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_input_changed_in_place_is_refused(strategy: str) -> None:
    x, y = data()
    with pytest.raises(MemberError, match="clone"):
        ensemble(divides, strategy).loss(F.cross_entropy, x, y)
    with pytest.raises(MemberError, match="clone"):
        ensemble(divides, strategy)(x)


def divides_large(self: Any, x: Tensor) -> Tensor:
    return self.head(self.trunk(x.div_(9.0) if x.max() > 100 else x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_input_changed_in_place_later_is_refused_too(strategy: str) -> None:
    x, y = data()
    ens = ensemble(divides_large, strategy)
    ens(x)
    with pytest.raises(MemberError, match="clone"):
        ens(x + 200)
    with pytest.raises(MemberError, match="clone"):
        ens.loss(F.cross_entropy, x + 200, y)


def assigns(self: Any, x: Tensor) -> Tensor:
    z = self.trunk(x)
    self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
    return self.head(z - self.mean)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("members", [1, K])
def test_a_buffer_that_is_assigned_is_every_members_own(strategy: str, members: int) -> None:
    x, y = data()
    ens = ensemble(assigns, strategy, members)
    alone = [ens.member(k) for k in range(members)]
    for _ in range(2):
        outputs = ens(x)
        losses = ens.loss(F.cross_entropy, x, y)
        for k, member in enumerate(alone):
            torch.testing.assert_close(outputs[k], member(x))
            torch.testing.assert_close(losses[k], F.cross_entropy(member(x), y))
            torch.testing.assert_close(ens.stacked.mean[k], member.mean)


def scales_and_assigns(self: Any, x: Tensor) -> Tensor:
    z = self.trunk(x) * (self.mean + 1)
    self.mean = self.mean + z.detach().mean(0)
    return self.head(z * self.mean)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("members", [1, K])
@pytest.mark.parametrize("called", [True, False])
def test_gradients_through_a_buffer_that_is_assigned_are_those_of_alone(
    strategy: str, members: int, called: bool
) -> None:
    x, y = data()
    ens = ensemble(scales_and_assigns, strategy, members)
    alone = [ens.member(k) for k in range(members)]
    for _ in range(2):
        outputs = ens(x) if called else None
        losses = ens.loss(F.cross_entropy, x, y) if outputs is None else outputs.square().sum((1, 2))
        losses.sum().backward()
        for member in alone:
            (member(x).square().sum() if called else F.cross_entropy(member(x), y)).backward()
    for k, member in enumerate(alone):
        torch.testing.assert_close(ens.stacked.mean[k], member.mean)
        torch.testing.assert_close(ens.stacked.trunk.weight.grad[k], member.trunk.weight.grad)


def makes_buffer(self: Any, x: Tensor) -> Tensor:
    self.late = self.trunk(x).detach().mean(0)
    return self.head(self.late)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_buffer_made_in_forward_is_refused_by_name(strategy: str) -> None:
    with pytest.raises(MemberError, match="makes or removes late"):
        ensemble(makes_buffer, strategy)(data()[0])


def test_numpys_randomness_is_not_frozen() -> None:
    ens = ensemble(lambda self, x: self.head(self.trunk(x)) * np.random.rand())
    x, _ = data()
    assert "random" in str(ens.plan(x).refusal)
    assert not torch.equal(ens(x), ens(x))


def draws(self: Any, x: Tensor) -> Tensor:
    return self.head(self.trunk(x)) * np.random.rand()


def draws_and_branches(self: Any, x: Tensor) -> Tensor:
    out = draws(self, x)
    return out if self.mean.sum() < 1 else x


@pytest.mark.parametrize("how", [draws, draws_and_branches])
def test_a_first_run_draws_no_more_than_the_members(how: Any) -> None:
    ens = ensemble(how)
    np.random.seed(0)
    ens(data()[0])
    found = np.random.rand()
    np.random.seed(0)
    assert found == np.random.rand(K + 1)[-1]


class Configured(nn.Module):
    """Settings in a dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.config: dict[str, Any] = {"scales": [1.0, 2.0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.config["scales"][1]


def test_a_setting_changed_in_a_container_counts() -> None:
    ens = Ensemble.from_factory(Configured, range(K))
    x, _ = data()
    before = ens(x)
    ens.stacked.config["scales"][1] = 6.0
    torch.testing.assert_close(ens(x), before * 3)


class Ramp(nn.Module):
    """A parameter beside a plain tensor of higher rank, which the input's shape makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.rates, torch.arange(x.shape[0]).unsqueeze(1)) + x


@pytest.mark.parametrize("n", [1, 2, K, 7])
def test_a_plain_tensor_of_higher_rank_stays_off_the_member_axis(n: int) -> None:
    ens = Ensemble.from_factory(Ramp, range(K))
    ens(torch.randn(5, 6))
    x = torch.randn(n, 6)
    torch.testing.assert_close(ens(x), torch.stack([ens.member(k)(x) for k in range(K)]))
    assert ens.execution.last_plan.refusal is None


class Scaled(nn.Module):
    """A folded value beside a plain tensor along its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (torch.arange(x.shape[1] + 1).view(-1, 1, 1) + 1.0)


def test_a_plain_tensor_meets_every_members_channels() -> None:
    ens = Ensemble.from_factory(Scaled, range(K))
    x = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(ens(x), torch.stack([ens.member(k)(x) for k in range(K)]))
    assert ens.execution.last_plan.refusal is None


def test_an_out_of_none_keeps_nothing_from_folding() -> None:
    ens = ensemble(lambda self, x: self.head(F.normalize(self.trunk(x))))
    assert ens.plan(data()[0]).refusal is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wrap", [lambda x: {"a": [x]}, lambda x: [x], lambda x: {"a": x, "n": 2}])
def test_own_reaches_into_trees(wrap: Callable[[Tensor], Any], strategy: str) -> None:
    def first(tree: Any) -> Tensor:
        tree = tree["a"] if isinstance(tree, dict) else tree
        return tree[0] if isinstance(tree, list) else tree

    ens = ensemble(lambda self, tree: self.head(self.trunk(first(tree))), strategy)
    x, y = torch.randn(K, 5, 4), torch.randint(0, 3, (K, 5))
    expected = torch.stack([ens.member(k)(wrap(x[k])) for k in range(K)])
    torch.testing.assert_close(ens.own(wrap(x)), expected)
    losses = torch.stack([F.cross_entropy(e, t) for e, t in zip(expected, y, strict=True)])
    torch.testing.assert_close(ens.loss(F.cross_entropy, wrap(x), y, own=True), losses)
    with pytest.raises(ShapeError, match="K = 3"):
        ens.own(wrap(x[:2]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_own_targets_may_be_a_tuple(strategy: str) -> None:
    def weighted(out: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return ((out - target[0]) ** 2 * target[1]).mean()

    ens = ensemble(lambda self, x: self.head(self.trunk(x)), strategy)
    x, y, w = torch.randn(K, 5, 4), torch.randn(K, 5, 3), torch.rand(K, 5, 3)
    expected = [weighted(ens.member(k)(x[k]), (y[k], w[k])) for k in range(K)]
    torch.testing.assert_close(ens.loss(weighted, x, (y, w), own=True), torch.stack(expected))


def normal(self: Any, x: Tensor) -> Any:
    return torch.distributions.Normal(self.head(self.trunk(x)), 1.0)


def beside_a_number(self: Any, x: Tensor) -> Any:
    out = self.head(self.trunk(x))
    return out, out.mean().item()


LOSSES: dict[Any, Callable[[Any, Any], Tensor]] = {
    normal: lambda out, y: -out.log_prob(y.unsqueeze(1)).mean(),
    beside_a_number: lambda out, y: F.cross_entropy(out[0], y) + out[1],
}


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_of_each_members_own_output_whatever_it_is(
    how: Any, recorded: bool, strategy: str
) -> None:
    ens, (x, y) = ensemble(how, strategy), data()
    with torch.set_grad_enabled(recorded):
        expected = torch.stack([LOSSES[how](ens.member(k)(x), y) for k in range(K)])
        for _ in range(2):
            torch.testing.assert_close(ens.loss(LOSSES[how], x, y), expected)


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_that_cannot_be_stacked_are_refused(how: Any, strategy: str) -> None:
    ens = ensemble(how, strategy)
    for call in (ens, ens.predict):
        with pytest.raises(MemberError, match="cannot be stacked"):
            call(data()[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("members", [1, 2])
def test_recurrent_members_train_as_alone(kind: type[nn.Module], strategy: str, members: int) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(4, 5, batch_first=True, bidirectional=True), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    ens = Ensemble.from_factory(Last, range(members), strategy=strategy)
    modules = [ens.member(k) for k in range(members)]
    x, y = torch.randn(5, 6, 4), torch.randint(0, 3, (5,))

    def trained(parameters: Any, loss: Callable[[], Tensor]) -> None:
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss().sum().backward()
            optimizer.step()

    trained(ens.parameters(), lambda: ens.loss(F.cross_entropy, x, y))
    for k, module in enumerate(modules):
        trained(module.parameters(), lambda module=module: F.cross_entropy(module(x), y))
        torch.testing.assert_close(ens(x)[k], module(x))
        for p, q in zip(ens.stacked.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(p[k], q)
