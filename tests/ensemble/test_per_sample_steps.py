"""`clip_per_sample` on an ensemble over several passes, after errors, on what it refuses, and removed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import psgrad
from psgrad.clipping import PerLayer
from psgrad.ensemble import Ensemble
from psgrad.errors import CaptureError, ConfigError, RefusedModelError, ShapeError
from tests.ensemble.models import images, rows
from tests.ensemble.per_sample_cases import (
    FOLDED,
    K,
    clipped,
    criterion,
    data,
    one_at_a_time,
)

pytestmark = pytest.mark.usefixtures("double")


def test_members_that_backward_does_not_reach_contribute_nothing() -> None:
    for strategy in ("folded", "loop"):
        fn, make = FOLDED["convolutions"]
        ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
        x, y = data(make, K, 5, False)
        with psgrad.clip_per_sample(ens, 0.3) as handle:
            ens.loss(F.cross_entropy, x, y)[1].backward()
        assert (handle.result.norms > 0).all(1).tolist() == [False, True, False]
        for p in ens.parameters():
            assert p.grad is not None
            assert not p.grad[[0, 2]].any()


def test_a_step_follows_the_parameters_modes_and_settings_of_the_ensemble() -> None:
    def fn() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    for strategy in ("folded", "loop"):
        ens = Ensemble.from_factory(fn, range(K), strategy=strategy).float()
        x, y = data(rows, K, 5, False)
        with psgrad.clip_per_sample(ens, 0.3) as handle:
            ens.double().eval()
            with torch.no_grad():
                for p in ens.parameters():
                    p += 0.1
            ens.loss(F.cross_entropy, x, y).sum().backward()
            for k in range(K):
                _, norms = one_at_a_time(ens, k, x, y, 0.3, "mean")
                torch.testing.assert_close(handle.result.norms[k], norms)


class _Scaled(nn.Module):
    """Its scale is in an object, and its layer in a list beside its name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.layers, self.config = [self.linear], SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) * self.config.scale


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_a_step_follows_settings_in_objects(strategy: str) -> None:
    ens = Ensemble.from_factory(_Scaled, range(K), strategy=strategy).double()
    x, y = data(rows, K, 5, False)
    with psgrad.clip_per_sample(ens, 0.3) as handle:
        for scale in (1.0, 2.0):
            ens.stacked.config.scale = scale
            ens.loss(F.cross_entropy, x, y).sum().backward()
            for k in range(K):
                _, norms = one_at_a_time(ens, k, x, y, 0.3, "mean")
                torch.testing.assert_close(handle.result.norms[k], norms)
            ens.zero_grad()


def test_backward_passes_add_up_to_a_logical_step() -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy="folded")
    x, y = data(make, K, 6, False)
    with psgrad.clip_per_sample(ens, 0.3, "sum") as handle:
        for part in (slice(0, 4), slice(4, 6)):
            ens.loss(criterion("sum"), x[part], y[part]).sum().backward()
        gathered = handle.take()
    assert (gathered.backward_passes, int(gathered.samples)) == (2, 6 * K)
    assert gathered.l2_bound == pytest.approx(0.3 * K**0.5)
    whole = copy.deepcopy(ens)
    whole.zero_grad()
    clipped(whole, x, y, False, 0.3, "sum")
    for p, q in zip(ens.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_folded_and_a_looped_forward_in_one_backward_add_up_before_the_norm() -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy="folded")
    (x, y), (other, _) = data(make, K, 5, False), data(make, K, 5, False)
    with psgrad.clip_per_sample(ens, 0.3) as handle:
        loss = ens.loss(F.cross_entropy, x, y)
        ens.execution.strategy = "loop"
        (loss + ens.loss(F.cross_entropy, other, y)).sum().backward()
    for k in range(K):
        alone = ens.member(k)
        with psgrad.clip_per_sample(alone, 0.3) as own:
            (F.cross_entropy(alone(x), y) + F.cross_entropy(alone(other), y)).backward()
        torch.testing.assert_close(handle.result.norms[k], own.result.norms)
        for p, q in zip(ens.stacked.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad[k], q.grad)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_a_sample_changes_all_members_sums_by_the_bound_at_most(strategy: str) -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    x, y = data(make, K, 5, False)
    fewer = copy.deepcopy(ens)
    result = clipped(ens, x, y, False, 1e-3, "sum")
    clipped(fewer, x[:4], y[:4], False, 1e-3, "sum")
    changes = [p.grad - q.grad for p, q in zip(ens.parameters(), fewer.parameters(), strict=True)]
    change = sum(c.square().sum() for c in changes).sqrt()
    assert result.l2_bound == pytest.approx(1e-3 * K**0.5)
    assert change == pytest.approx(result.l2_bound, rel=1e-6)  # every sample is longer than C
    for k in range(K):
        own = sum(c[k].square().sum() for c in changes).sqrt()
        assert own == pytest.approx(1e-3, rel=1e-6)


def test_a_style_by_path_names_the_ensembles_parameters() -> None:
    ens = Ensemble.from_factory(FOLDED["wide"][0], range(K), strategy="folded")
    x, y = data(rows, K, 5, False)
    result = clipped(ens, x, y, False, PerLayer({"stacked.0": 0.1, "": 0.2}))
    assert {path: norms.shape for path, norms in result.group_norms.items()} == {
        "stacked.0": (K, 5),
        "": (K, 5),
    }


def test_the_ensemble_is_given_back_and_copies_are_free() -> None:
    ens = Ensemble.from_factory(FOLDED["wide"][0], range(K), strategy="folded")
    x, y = data(rows, K, 5, False)
    handle = psgrad.clip_per_sample(ens, 0.3)
    free = copy.deepcopy(ens)
    free.loss(F.cross_entropy, x, y).sum().backward()
    with pytest.raises(ConfigError, match="remove"):
        ens.keep([0])
    with pytest.raises(RefusedModelError, match="attached already"):
        psgrad.clip_per_sample(ens, 0.3)
    handle.remove()
    ens.loss(F.cross_entropy, x, y).sum().backward()
    for p, q in zip(ens.parameters(), free.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    ens.keep([0, 2])
    clipped(ens, x, y, False, 0.3)


@pytest.mark.parametrize("following", [0, 5])
@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_after_a_backward_that_failed_the_next_is_right(strategy: str, following: int) -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    x, y = data(make, K, 5, False)
    with psgrad.clip_per_sample(ens, 0.3) as handle:
        reached_all_layers = ens(_Fails.apply(x.clone().requires_grad_()))
        with pytest.raises(ZeroDivisionError):
            reached_all_layers.sum().backward()
        x, y = x[:following], y[:following]  # an empty batch runs member by member
        ens.loss(F.cross_entropy, x, y).sum().backward()
        assert handle.result.norms.shape == (K, following)
        if following:
            expected, norms = one_at_a_time(ens, 1, x, y, 0.3, "mean")
            torch.testing.assert_close(handle.result.norms[1], norms)
            torch.testing.assert_close(ens.stacked[0].weight.grad[1], expected["0.weight"])


def test_what_mixes_samples_is_refused_by_path() -> None:
    ens = Ensemble.from_factory(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), range(K))
    with pytest.raises(RefusedModelError, match=r"1 \(BatchNorm2d\)"):
        psgrad.clip_per_sample(ens, 0.3)
    ens.eval()
    with psgrad.clip_per_sample(ens, 0.3):
        ens(images(2))
        ens.train()
        with pytest.raises(RefusedModelError, match=r"1 \(BatchNorm2d\)"):
            ens(images(2))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
@pytest.mark.parametrize("own", [False, True])
def test_a_module_that_mixes_samples_is_refused_on_the_first_batch(own: bool, strategy: str) -> None:
    ens = Ensemble.from_factory(
        lambda: nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 2)), range(K), strategy=strategy
    )
    shape = (K, 5, 4) if own else (5, 4)
    with psgrad.clip_per_sample(ens, 0.3):
        ens(torch.randn(shape)[..., :1, :], own=own)  # one sample says nothing
        with pytest.raises(RefusedModelError, match=r"1 \(Centred\): mixes samples"):
            ens(torch.randn(shape), own=own)


def test_what_does_not_fit_is_refused() -> None:
    fn = FOLDED["wide"][0]
    ens = Ensemble.from_factory(fn, range(K))
    with pytest.raises(ConfigError, match="adaptive"):
        psgrad.clip_per_sample(ens, psgrad.clipping.AdaptiveQuantile(1.0, 5.0))
    ens(rows(2))  # nothing is left attached
    for handle in (
        lambda module: psgrad.clip_per_sample(module, 0.3),
        psgrad.GradNorms,
        psgrad.PerSampleGrads,
    ):
        with pytest.raises(RefusedModelError, match=r"0 \(Ensemble\)"):
            handle(nn.Sequential(ens))
    with psgrad.clip_per_sample(ens, 0.3):
        with pytest.raises(ShapeError, match="own data"):
            ens(rows(2), own=True)
        with pytest.raises(TypeError, match="owned"):
            ens(rows(2), owned=True)
        ens.stacked[0].weight.requires_grad_(False)
        with pytest.raises(CaptureError, match=r"stacked\.0\.weight"):
            ens(rows(2))
        ens.stacked[0].weight.requires_grad_(True)
        penalty = ens.stacked[0].weight.square().sum()
        with pytest.raises(CaptureError, match=r"stacked\.0\.weight"):
            (ens(rows(2)).sum() + penalty).backward()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        raise ZeroDivisionError
