"""`clip_per_sample` on an ensemble: every member clipped as if it were alone, to one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import psgrad
from psgrad.clipping import PerLayer
from psgrad.ensemble import Ensemble
from psgrad.errors import CaptureError, ConfigError, RefusedModelError, ShapeError
from tests.ensemble.models import Branches, Branching, Silent, Tied, View, images, rows, tokens
from tests.model_oracle import grads_one_by_one

K = 3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    yield
    torch.set_default_dtype(torch.float32)


class Twice(nn.Module):
    """A layer that is called twice, on values that lie differently, and one of which a part is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3).eval()
        self.norm.running_mean.normal_()
        self.head = nn.Linear(3, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(torch.relu(self.mix(x)))).mean([2, 3]))


class Attention(nn.Module):
    """A position embedding and an attention: parameters that no layer with a rule owns."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.position
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Turned(nn.Module):
    """A layer whose rows are positions, not samples; five positions look like a batch of five."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.word(tokens).transpose(0, 1)).mean(0)


FOLDED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
            nn.Conv2d(4, 4, 2, groups=4, padding="same"),
            nn.LayerNorm([4, 3, 3]),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        images,
    ),
    "on shared data with groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(96, 3)),
        images,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
            nn.InstanceNorm2d(4, affine=True),
            nn.ConvTranspose2d(4, 4, 2, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        images,
    ),
    "padding": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(72, 3)
        ),
        images,
    ),
    "wide": (lambda: nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)), rows),
    "tied and frozen": (Tied, tokens),
    "called twice": (Twice, images),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)),
        rows,
    ),
    "one layer": (lambda: nn.Linear(4, 3), rows),
}
LOOPED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "a parameter of its own": (Branches, images),
    "attention": (Attention, tokens),
    "rows that are positions": (Turned, tokens),
    "two positions": (Turned, lambda n: tokens(n)[:, :2]),
    "control flow": (Branching, rows),
    "no_grad block": (Silent, rows),
    "changed through a view": (View, rows),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Dropout(0.5)),
        rows,
    ),
}
CASES = {**FOLDED, **LOOPED}
NOT_ONE_BY_ONE = ("dropout", "parametrized", "control flow")
"""Where a sample alone draws another mask, or takes another branch, than in its batch."""


def criterion(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, y: F.cross_entropy(out, y, reduction=reduction)


def data(make: Callable[[int], Tensor], members: int, n: int, own: bool) -> tuple[Tensor, Tensor]:
    x = torch.stack([make(n) for _ in range(members)]) if own else make(n)
    return x, torch.randint(0, 3, (members, n) if own else (n,))


def one_at_a_time(
    ens: Ensemble, k: int, x: Tensor, y: Tensor, max_norm: float, reduction: str
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Member k's flat clipped gradient by path, and its samples' norms: an ordinary backward a sample."""

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    grads = grads_one_by_one(ens.member(k), loss_of, [x, y])
    used = {path: grad for path, grad in grads.items() if grad is not None}
    norms = sum(grad.flatten(1).square().sum(1) for grad in used.values()).sqrt()
    factors = (max_norm / norms).clamp(max=1.0) / (len(x) if reduction == "mean" else 1)
    return {path: torch.einsum("n,n...->...", factors, grad) for path, grad in used.items()}, norms


def clipped(
    ens: Ensemble, x: Tensor, y: Tensor, own: bool, max_norm: float, reduction: str = "mean", **settings
) -> psgrad.clipping.ClipResult:
    with psgrad.clip_per_sample(ens, max_norm, reduction, **settings) as handle:
        ens.loss(criterion(reduction), x, y, own=own).sum().backward()
        return handle.result


def median_norm(ens: Ensemble, x: Tensor, y: Tensor, own: bool) -> float:
    """A bound that some samples are above and some below."""
    norms = clipped(copy.deepcopy(ens), x, y, own, 1.0).norms
    return float(norms.median()) if norms.numel() else 1.0


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
        ens = Ensemble.from_factory(fn, range(members), strategy=strategy)  # type: ignore[arg-type]
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
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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


def test_members_that_backward_does_not_reach_contribute_nothing() -> None:
    for strategy in ("folded", "loop"):
        fn, make = FOLDED["convolutions"]
        ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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
        ens = Ensemble.from_factory(fn, range(K), strategy=strategy).float()  # type: ignore[arg-type]
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
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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
    result = clipped(ens, x, y, False, PerLayer({"stacked.0": 0.1, "": 0.2}))  # type: ignore[arg-type]
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
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)  # type: ignore[arg-type]
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
    for handle in (psgrad.GradNorms, psgrad.PerSampleGrads):
        with pytest.raises(RefusedModelError, match=r"member\(k\)"):
            handle(ens)
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
