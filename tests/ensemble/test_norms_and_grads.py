"""`PerSampleGrads` and `GradNorms` on an ensemble: every member's, as one sample at a time alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad import ConfigError, GradNorms, PerSampleGrads
from psgrad.ensemble import Ensemble
from tests.ensemble.models import rows
from tests.ensemble.per_sample_cases import CASES, FOLDED, NOT_ONE_BY_ONE, K, criterion, data
from tests.model_oracle import grads_one_by_one

pytestmark = pytest.mark.usefixtures("double")

N = 5


def alone(
    ens: Ensemble, x: Tensor, y: Tensor, own: bool, rows_per_sample: int = 1
) -> list[dict[str, Tensor]]:
    """Every member's per-sample gradients by path, an ordinary backward a sample."""

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    found = []
    for k in range(ens.members):
        batch = [x[k], y[k]] if own else [x, y]
        grads = grads_one_by_one(ens.member(k), loss_of, batch, rows_per_sample)
        found.append({path: grad for path, grad in grads.items() if grad is not None})
    return found


def norms_of(grads: dict[str, Tensor]) -> Tensor:
    return torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ONE_BY_ONE])
def test_gradients_and_norms_are_those_of_one_sample_at_a_time(name: str, own: bool, reduction: str) -> None:
    fn, make = CASES[name]
    ens = Ensemble.from_factory(fn, range(10, 10 + K), strategy="folded")
    x, y = data(make, K, N, own)
    expected = alone(ens, x, y, own)
    with PerSampleGrads(ens, reduction):
        ens.loss(criterion(reduction), x, y, own=own).sum().backward()
    over = N if reduction == "mean" else 1
    for path, p in ens.stacked.named_parameters():
        if getattr(p, "grad_sample", None) is None:
            assert path not in expected[0], path
            continue
        assert p.grad_sample.shape == (K, N, *p.shape[1:])
        for k in range(K):
            torch.testing.assert_close(p.grad_sample[k], expected[k][path], rtol=1e-9, atol=1e-13)
            ordinary = expected[k][path].sum(0) / over
            torch.testing.assert_close(p.grad[k], ordinary, rtol=1e-9, atol=1e-13)
    ens.zero_grad()
    with GradNorms(ens, reduction) as monitor:
        ens.loss(criterion(reduction), x, y, own=own).sum().backward()
    assert monitor.norms.shape == (K, N)
    scale = monitor.noise_scale
    for k in range(K):
        torch.testing.assert_close(monitor.norms[k], norms_of(expected[k]), rtol=1e-10, atol=1e-12)
        flat = torch.cat([grad.flatten(1) for grad in expected[k].values()], 1)
        torch.testing.assert_close(scale.trace[k], flat.var(0).sum())
        torch.testing.assert_close(scale.squared_norm[k], flat.mean(0).square().sum() - scale.trace[k] / N)
        for path, p in ens.stacked.named_parameters():
            if path in expected[k]:
                ordinary = expected[k][path].sum(0) / over
                torch.testing.assert_close(p.grad[k], ordinary, rtol=1e-9, atol=1e-13)
    layers = torch.stack(list(monitor.per_layer.values()))
    assert layers.shape[1:] == (K, N)
    torch.testing.assert_close(layers.square().sum(0).sqrt(), monitor.norms)


@pytest.mark.parametrize("strategy", ["folded", "loop"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_rows_of_one_sample_go_together(own: bool, strategy: str) -> None:
    fn, make = FOLDED["convolutions"]
    ens = Ensemble.from_factory(fn, range(K), strategy=strategy)
    x, y = data(make, K, 6, own)
    expected = alone(ens, x, y, own, rows_per_sample=2)
    with GradNorms(ens, rows_per_sample=2) as monitor:
        ens.loss(F.cross_entropy, x, y, own=own).sum().backward()
    with PerSampleGrads(ens, rows_per_sample=2):
        ens.loss(F.cross_entropy, x, y, own=own).sum().backward()
    for k in range(K):
        torch.testing.assert_close(monitor.norms[k], norms_of(expected[k]))
        for path, p in ens.stacked.named_parameters():
            torch.testing.assert_close(p.grad_sample[k], expected[k][path])


@pytest.mark.parametrize("members", [1, K])
@pytest.mark.parametrize("strategy", ["folded", "loop"])
def test_an_empty_batch(strategy: str, members: int) -> None:
    ens = Ensemble.from_factory(FOLDED["wide"][0], range(members), strategy=strategy)
    with GradNorms(ens, "sum") as monitor:
        ens(rows(0)).sum().backward()
    assert monitor.norms.shape == (members, 0)
    with PerSampleGrads(ens, "sum"):
        ens(rows(0)).sum().backward()
    for p in ens.parameters():
        assert p.grad_sample.shape == (members, 0, *p.shape[1:])


def test_one_member_keeps_its_axis() -> None:
    ens = Ensemble.from_factory(FOLDED["wide"][0], [0])
    with GradNorms(ens) as monitor:
        ens.loss(F.cross_entropy, rows(4), torch.randint(3, (4,))).sum().backward()
    assert monitor.norms.shape == (1, 4)
    assert monitor.noise_scale.trace.shape == (1,)
    with PerSampleGrads(ens):
        ens.loss(F.cross_entropy, rows(4), torch.randint(3, (4,))).sum().backward()
    assert ens.stacked[0].weight.grad_sample.shape == (1, 4, 40, 4)


def test_outliers_are_those_of_a_member() -> None:
    ens = Ensemble.from_factory(lambda: nn.Linear(4, 3), range(K))
    x = rows(8).expand(K, 8, 4).clone()
    x[1, 6] *= 1e3
    with GradNorms(ens, "sum") as monitor:
        ens(x, own=True).square().sum().backward()
    assert monitor.outliers(member=1)[0] == 6
    assert 6 not in monitor.outliers(100.0, member=0)
    for member in (None, K, -1):
        with pytest.raises(ConfigError, match=rf"member=0 to {K - 1}, got {member}"):
            monitor.outliers(member=member)
    model = nn.Linear(4, 3)
    with GradNorms(model, "sum") as monitor:
        model(rows(2)).sum().backward()
    with pytest.raises(ConfigError, match="this is one model"):
        monitor.outliers(member=0)


def test_a_member_that_is_not_finite_shows_in_its_own_norms_alone() -> None:
    ens = Ensemble.from_factory(FOLDED["wide"][0], range(K))
    x, y = data(rows, K, N, True)
    x[1, 2] = float("nan")
    with GradNorms(ens) as monitor:
        ens.loss(F.cross_entropy, x, y, own=True).sum().backward()
    finite = monitor.norms.isfinite()
    assert finite[[0, 2]].all()
    assert finite[1].tolist() == [True, True, False, True, True]
    assert monitor.noise_scale.trace.isfinite().tolist() == [True, False, True]
