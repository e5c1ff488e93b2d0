"""What `Ensemble` promises around the numbers: building, refusals, state, keep, predict, plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad import ConfigError, MemberError, ShapeError
from psgrad.ensemble import Ensemble
from tests.ensemble.models import Unseen


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


def test_members_are_bitwise_what_the_factory_builds_and_the_random_state_is_given_back() -> None:
    state = torch.get_rng_state()
    ens = Ensemble.from_factory(small, [5, 2])
    assert torch.equal(torch.get_rng_state(), state)
    for k, seed in enumerate((5, 2)):
        torch.manual_seed(seed)
        alone = small().state_dict()
        assert all(torch.equal(tensor, alone[path]) for path, tensor in ens.member(k).state_dict().items())
    assert type(ens.member(0)) is nn.Sequential
    assert {p.shape[0] for p in ens.parameters()} == {2}


def test_a_member_is_independent_of_the_ensemble() -> None:
    ens = Ensemble.from_factory(small, range(2))
    member = ens.member(1)
    with torch.no_grad():
        for p in member.parameters():
            p.zero_()
    assert all(p[1].abs().sum() > 0 for name, p in ens.named_parameters() if name.endswith("0.weight"))


def mixed_modes() -> list[nn.Module]:
    return [small().train(), small().eval()]


def shared_parameter() -> list[nn.Module]:
    first, second = small(), small()
    second[3].weight = first[3].weight
    return [first, second]


def frozen_in_one() -> list[nn.Module]:
    first, second = small(), small()
    second[0].weight.requires_grad_(False)
    return [first, second]


def other_setting() -> list[nn.Module]:
    return [nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))]


def tied_in_one() -> list[nn.Module]:
    pair = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)]
    pair[1][1].weight = pair[1][0].weight
    return list(pair)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (list, "at least one"),
        (mixed_modes, "0 and 1 differ in the mode"),
        (shared_parameter, r"3\.weight of member 1 is 3\.weight of member 0"),
        (frozen_in_one, r"0\.weight.*without gradient"),
        (other_setting, r"setting of 0\.p: 0\.1 and 0\.2"),
        (tied_in_one, r"differ in .* of 1\.weight"),
        (lambda: [nn.Linear(2, 3), nn.Linear(2, 4)], "differ in the shape"),
        (lambda: [nn.Linear(2, 3), nn.Bilinear(2, 3, 3)], "differ in the class"),
        (lambda: [nn.Linear(2, 3), nn.Linear(2, 3, bias=False)], "bias.*absent"),
        (lambda: [nn.Linear(2, 3), nn.Linear(2, 3, dtype=torch.float64)], "float32.*float64"),
        (lambda: [nn.Linear(2, 3), "linear"], "member 1 is a str"),
        (lambda: [nn.LazyLinear(2)], "no shape yet"),
    ],
)
def test_what_is_no_ensemble_is_refused_by_name(build: Callable[[], list[nn.Module]], words: str) -> None:
    with pytest.raises(MemberError, match=words):
        Ensemble.from_modules(build())


def test_the_same_module_twice_is_refused() -> None:
    module = small()
    with pytest.raises(MemberError, match="share nothing"):
        Ensemble.from_modules([module, module])


def test_equal_seeds_and_wrong_seeds_are_refused() -> None:
    with pytest.raises(MemberError, match="differ"):
        Ensemble.from_factory(small, [1, 1])
    with pytest.raises(MemberError, match="lowest 32 bits"):  # one stream to PyTorch's generator
        Ensemble.from_factory(small, seeds=[3, 3 + 2**32])
    with pytest.raises(MemberError, match="2 seeds for 1"):
        Ensemble.from_modules([small()], seeds=[1, 2])


def test_own_data_must_have_one_entry_a_member() -> None:
    ens = Ensemble.from_factory(small, range(3))
    with pytest.raises(ShapeError, match="K = 3"):
        ens.own(torch.randn(2, 6, 4))
    with pytest.raises(ConfigError, match="own must be"):
        ens(torch.randn(3, 6, 4), own="yes")
    assert ens.own(torch.randn(3, 6, 4)).shape == (3, 6, 3)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda out, y: out.sum(1), r"\(6,\)"),
        (lambda out, y: (out.sum(), y), "a tuple"),
        (lambda out, y: out.sum().item(), "a float"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(fn: Any, words: str, members: int, strategy: Any) -> None:
    ens = Ensemble.from_factory(small, range(members), strategy=strategy)
    with pytest.raises(ShapeError, match=f"scalar tensor, a member's is {words}"):
        ens.loss(fn, torch.randn(6, 4), torch.zeros(6))


@pytest.mark.parametrize(
    "fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5])),
        lambda out, y: F.cross_entropy(out, y) * (1.0 if out.detach().mean().item() > -1e9 else 0.0),
    ],
)
def test_every_loss_is_the_members_own(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    ens = Ensemble.from_factory(small, range(3)).eval()
    x, y = torch.randn(3, 6, 4), torch.randint(0, 3, (3, 6))
    y[1, :2] = -100
    expected = torch.stack([fn(ens.member(k)(x[k]), y[k]) for k in range(3)])
    torch.testing.assert_close(ens.loss(fn, x, y, own=True), expected)


def test_state_dict_resumes_bitwise_with_the_random_streams() -> None:
    x = torch.randn(6, 4)
    first = Ensemble.from_factory(small, range(2))
    first(x)
    state = copy.deepcopy(first.state_dict())
    second = Ensemble.from_factory(small, range(5, 7))
    second.load_state_dict(state)
    assert torch.equal(first(x), second(x))
    with pytest.raises(MemberError, match="2 members"):
        Ensemble.from_factory(small, range(3)).set_extra_state(state["_extra_state"])


def test_copies_are_independent_and_alike() -> None:
    x = torch.randn(6, 4)
    first = Ensemble.from_factory(small, range(2))
    first(x)
    second = copy.deepcopy(first)
    expected = first(x)
    assert torch.equal(second(x), expected)
    assert {id(p) for p in first.parameters()}.isdisjoint({id(p) for p in second.parameters()})


def test_keep_drops_members_and_training_goes_on() -> None:
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    ens = Ensemble.from_factory(small, range(4))
    parameters = list(ens.parameters())
    loss = ens.loss(F.cross_entropy, x, y)
    loss.sum().backward()
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    kept = [ens.member(k) for k in (3, 1)]
    ens.keep([3, 1])
    assert ens.members == 2
    assert [id(p) for p in ens.parameters()] == [id(p) for p in parameters]
    for p, grad in zip(parameters, grads, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad[[3, 1]])
    assert all(
        torch.equal(a, b)
        for k, member in enumerate(kept)
        for a, b in zip(member.state_dict().values(), ens.member(k).state_dict().values(), strict=True)
    )
    ens.loss(F.cross_entropy, x, y).sum().backward()
    for bad in ([], [0, 0], [2]):
        with pytest.raises(MemberError, match="keep"):
            ens.keep(bad)


def test_predict_gives_mean_variance_and_where_members_disagree() -> None:
    ens = Ensemble.from_factory(small, range(3))
    x = torch.randn(6, 4)
    before = {name: b.clone() for name, b in ens.named_buffers()}
    found = ens.predict(x)
    assert ens.training
    assert all(torch.equal(b, before[name]) for name, b in ens.named_buffers())
    members = torch.stack([ens.member(k).eval()(x).softmax(1) for k in range(3)])
    torch.testing.assert_close(found.members, members)
    torch.testing.assert_close(found.mean, members.mean(0))
    torch.testing.assert_close(found.variance, members.var(0, correction=0))
    assert found.entropy is not None
    assert found.mutual_information is not None
    torch.testing.assert_close(found.entropy, -(members.mean(0) * members.mean(0).log()).sum(1))
    inner = -(members * members.log()).sum(2).mean(0)
    torch.testing.assert_close(found.mutual_information, found.entropy - inner)
    assert (found.entropy <= math.log(3) + 1e-6).all()
    values = ens.predict(x, link="identity")
    assert values.entropy is None
    with pytest.raises(ConfigError, match="link"):
        ens.predict(x, link="probit")


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (lambda: nn.Linear(4, 1), "two classes at least"),
        (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), "two classes at least"),
        (lambda: nn.LSTM(4, 3), "returns a tuple"),
    ],
)
def test_what_has_no_classes_is_not_predicted_as_certain(member: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        Ensemble.from_factory(member, range(2)).predict(torch.randn(6, 4))


def test_the_plan_says_why_and_changes_nothing() -> None:
    ens = Ensemble.from_factory(small, range(2))
    before = {name: value.clone() for name, value in ens.state_dict().items()}
    plan = ens.plan(torch.randn(6, 4))
    assert plan.refusal is None
    assert [step.kind for step in plan.steps] == ["Linear", "BatchNorm1d", "Dropout", "Linear"]
    assert "bmm" in str(plan)
    assert all(torch.equal(value, before[name]) for name, value in ens.state_dict().items())
    looped = Ensemble.from_factory(small, range(2), strategy="loop").plan(torch.randn(6, 4))
    assert "asked for" in str(looped)


def test_large_members_run_one_after_the_other_unless_asked_otherwise() -> None:
    def fn() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())

    x = torch.randn(16, 3, 32, 32)
    ens = Ensemble.from_factory(fn, range(2))
    assert "elements" in str(ens.plan(x).refusal)
    torch.testing.assert_close(ens(x), torch.stack([ens.member(k)(x) for k in range(2)]))
    assert ens.plan(x[:1, :, :8, :8]).refusal is None
    assert Ensemble.from_factory(fn, range(2), strategy="folded").plan(x).refusal is None
    with pytest.raises(ConfigError, match="strategy"):
        Ensemble.from_factory(fn, range(2), strategy="fast")


@pytest.mark.parametrize(("channels", "side"), [(6, 20), (8, 32)])
def test_channels_that_leave_vectors_unfilled_fold_up_to_smaller_steps(channels: int, side: int) -> None:
    def fn() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())

    ens = Ensemble.from_factory(fn, range(2))
    most = 30_000 if channels == 6 else 85_000
    per_sample = channels * side**2
    few, many = (torch.randn(n, 3, side, side) for n in (most // per_sample, most // per_sample + 1))
    for x in (few, many):
        ens(x)
    assert ens.plan(few).refusal is None
    assert f"folding wins to {most:,}" in str(ens.plan(many).refusal)
    assert ("with 6 channels" in str(ens.plan(many).refusal)) == (channels == 6)


def test_train_and_eval_reach_every_layer() -> None:
    ens = Ensemble.from_factory(small, range(2))
    x = torch.randn(6, 4)
    ens(x)
    ens.eval()
    assert not ens.member(0).training
    assert torch.equal(ens(x), ens(x))
    torch.testing.assert_close(ens(x)[1], ens.member(1)(x))
    ens.train()
    assert not torch.equal(ens(x), ens(x))


def test_an_index_beyond_the_table_reaches_no_other_members_rows() -> None:
    ens = Ensemble.from_factory(lambda: nn.Embedding(4, 2), range(3))
    with pytest.raises(IndexError):
        ens(torch.tensor([[0, 4]]))
    with pytest.raises(IndexError):
        ens(torch.tensor([[-1, 0]]))
    assert ens(torch.tensor([[0, 3]])).shape == (3, 1, 2, 2)


@pytest.mark.parametrize("strategy", ["auto", "folded"])
def test_a_first_batch_without_samples_checks_nothing(strategy: str) -> None:
    """`Unseen` stops gradients where its graph does not show it: only the check finds it."""
    ens = Ensemble.from_factory(Unseen, range(2), strategy=strategy)
    assert ens(torch.randn(0, 4)).shape[:2] == (2, 0)
    assert "no sample" in str(ens.execution.last_plan.refusal)
    ens.loss(lambda out, y: out.sum(), torch.randn(0, 4), torch.zeros(0)).sum().backward()
    x = torch.randn(3, 4)
    ens.zero_grad()
    ens(x).sum().backward()
    for k in range(2):
        alone = ens.member(k)
        alone(x).sum().backward()
        for p, q in zip(ens.stacked.parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad[k], q.grad)


def test_a_first_batch_without_samples_does_not_stop_folding() -> None:
    ens = Ensemble.from_factory(lambda: nn.Linear(4, 3), range(4))
    ens(torch.randn(0, 4))
    ens(torch.randn(3, 4))
    ens(torch.randn(3, 4))
    assert ens.execution.last_plan.refusal is None
