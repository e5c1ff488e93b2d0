"""Member k of an ensemble is the model fitted alone: float64, over steps, buffers and dropout included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from psgrad.ensemble import Ensemble
from tests.ensemble.models import FOLDED, LOOPED

K, N, STEPS = 3, 4, 4
CASES = {**FOLDED, **LOOPED}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    yield
    torch.set_default_dtype(torch.float32)


def alone(fn: Callable[[], nn.Module], seed: int, xs: list[Tensor], ys: list[Tensor]) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fn()
        fit(model, [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in zip(xs, ys, strict=True)])
    return model.state_dict()


def fit(model: nn.Module, losses: list[Callable[[], Tensor]]) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def ensemble_states(
    fn: Callable[[], nn.Module], xs: list[Tensor], ys: list[Tensor], own: bool, strategy: str = "folded"
) -> Ensemble:
    ens = Ensemble.from_factory(fn, range(10, 10 + K), strategy=strategy)
    fit(
        ens,
        [
            lambda x=x, y=y: ens.loss(F.cross_entropy, x, y, own=own).sum()
            for x, y in zip(xs, ys, strict=True)
        ],
    )
    return ens


def data(make: Callable[[int], Tensor], own: bool) -> tuple[list[Tensor], list[Tensor]]:
    xs = [torch.stack([make(N) for _ in range(K)]) if own else make(N) for _ in range(STEPS)]
    ys = [torch.randint(0, 3, (K, N) if own else (N,)) for _ in range(STEPS)]
    return xs, ys


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", CASES)
def test_every_member_is_the_model_fitted_alone(name: str, own: bool) -> None:
    fn, make = CASES[name]
    xs, ys = data(make, own)
    ens = ensemble_states(fn, xs, ys, own)
    assert (ens.plan(xs[0], own=own).refusal is None) == (name in FOLDED)
    for k in range(K):
        expected = alone(fn, 10 + k, [x[k] for x in xs] if own else xs, [y[k] for y in ys] if own else ys)
        found = ens.member(k).state_dict()
        assert list(found) == list(expected)
        for path in expected:
            torch.testing.assert_close(found[path], expected[path], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FOLDED)
def test_no_layer_of_a_known_kind_runs_outside_its_rule(name: str) -> None:
    fn, make = FOLDED[name]
    plan = Ensemble.from_factory(fn, range(K), strategy="folded").plan(make(N))
    assert {step.strategy for step in plan.steps} <= {
        "bmm", "folded", "gather", "grouped", "once", "one convolution", "one product", "stacked",
    }, plan  # fmt: skip  # one a line is a page


@pytest.mark.parametrize("name", FOLDED)
def test_the_loop_gives_the_same_as_the_folded_run(name: str) -> None:
    fn, make = FOLDED[name]
    xs, ys = data(make, True)
    folded, looped = (ensemble_states(fn, xs, ys, True, how) for how in ("folded", "loop"))
    for path, tensor in folded.state_dict().items():
        torch.testing.assert_close(tensor, looped.state_dict()[path], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fill", [float("nan"), 1e3], ids=["nan", "other"])
@pytest.mark.parametrize("name", [name for name, (_, make) in FOLDED.items() if make(1).is_floating_point()])
def test_what_one_member_sees_changes_nothing_in_another_bitwise(name: str, fill: float) -> None:
    fn, make = FOLDED[name]
    xs, ys = data(make, True)
    before = ensemble_states(fn, xs, ys, True)
    for x in xs:
        x[1] = fill
    after = ensemble_states(fn, xs, ys, True)
    for k in (0, 2):
        for a, b in zip(
            before.member(k).state_dict().values(), after.member(k).state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)


def test_permuted_members_give_permuted_results() -> None:
    fn, make = FOLDED["residual"]
    modules = [fn() for _ in range(K)]
    x, order = make(N), [2, 0, 1]
    out = Ensemble.from_modules(modules)(x)
    permuted = Ensemble.from_modules([modules[k] for k in order])(x)
    torch.testing.assert_close(permuted, out[order])


def test_one_member_is_plain_pytorch() -> None:
    fn, make = FOLDED["batch norm"]
    module, x = fn(), make(N)
    out = Ensemble.from_modules([module])(x)
    assert out.shape[0] == 1
    torch.testing.assert_close(out[0], module(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_torchvision_models(name: str) -> None:
    def fn() -> nn.Module:
        return get_model(name, weights=None, num_classes=3)

    # Four samples: BatchNorm over two values, where the maps are one position, amplifies rounding.
    xs, ys = [torch.randn(4, 3, 64, 64)] * 2, [torch.randint(0, 3, (4,))] * 2
    ens = Ensemble.from_factory(fn, [3, 4], strategy="folded")
    fit(ens, [lambda x=x, y=y: ens.loss(F.cross_entropy, x, y).sum() for x, y in zip(xs, ys, strict=True)])
    assert ens.plan(xs[0]).refusal is None
    expected, found = alone(fn, 4, xs, ys), ens.member(1).state_dict()
    for path in expected:
        torch.testing.assert_close(found[path], expected[path], rtol=1e-8, atol=1e-10)
