"""The step benchmark: its truth, its gate, its contenders and its models."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from psgrad.bench.step import check, measure_step, reference
from psgrad.bench.step_models import MODELS, without_in_place
from psgrad.bench.step_peers import STEPPERS, NonPrivate, Written, written_bytes
from tests.model_oracle import grads_one_by_one

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Extension saving to")

TINY = MODELS["tiny"]


def truth_of(name, batch_size=6):
    model = MODELS[name].seeded()
    x, y = MODELS[name].batch(batch_size)
    return model, x, y, reference(model, x, y)


def test_the_reference_is_the_loop_with_half_of_the_samples_clipped():
    model, x, y, truth = truth_of("tiny")
    grads = grads_one_by_one(
        copy.deepcopy(model).double(), lambda m, x, y: F.cross_entropy(m(x), y), (x.double(), y)
    )
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
    torch.testing.assert_close(truth.norms, norms)
    assert (norms > truth.max_norm).sum() == 3
    factors = (truth.max_norm / norms).clamp(max=1) / 6
    torch.testing.assert_close(truth.clipped, [torch.tensordot(factors, g, 1) for g in grads.values()])
    torch.testing.assert_close(truth.ordinary, [g.mean(0) for g in grads.values()])


@pytest.mark.parametrize("name", STEPPERS)
@pytest.mark.parametrize("model", ["tiny", "tanh-cnn-28"])
def test_every_contender_is_right_step_after_step(model, name):
    net, x, y, truth = truth_of(model)
    before = copy.deepcopy(net.state_dict())
    stepper = STEPPERS[name](net, truth.max_norm, len(x))
    if (name, model) == ("backpack", "tiny"):
        with pytest.raises(ValueError, match=r"leaves out '1\.weight'"):  # it has no GroupNorm
            stepper.gradient(x, y)
        return
    verdict = check(stepper, truth, x, y)
    assert (verdict.reason, verdict.error < 1e-4) == (None, True)
    stepper.update()
    assert all(p.grad is None and getattr(p, "grad_sample", None) is None for p in stepper.model.parameters())
    ordinary_or_clipped = truth.clipped if stepper.clips else truth.ordinary
    for p, start, grad in zip(stepper.model.parameters(), before.values(), ordinary_or_clipped, strict=True):
        torch.testing.assert_close(p.detach(), (start - 1e-3 * grad).to(p.dtype))

    moved = copy.deepcopy(net)
    moved.load_state_dict(dict(zip(before, (p.detach() for p in stepper.model.parameters()), strict=True)))
    again = reference(moved, x, y)
    if not stepper.clips:
        assert check(stepper, again, x, y).reason is None
    torch.testing.assert_close(net.state_dict(), before)  # the model it was made from stays as it is


class Distorted(NonPrivate):
    """The ordinary step with one parameter's gradient changed."""

    def __init__(self, change, model, max_norm, batch_size):
        super().__init__(model)
        self.change = change

    def gradient(self, x, y):
        super().gradient(x, y)
        p = self.model[0].bias
        p.grad = self.change(p.grad)


def refuse(grad):
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda grad: grad * 1.02, "wrong by 2.0%"),
        (lambda grad: grad * float("nan"), "not finite"),
        (lambda grad: None, "no gradient of 0.bias"),
        (refuse, "RuntimeError: first line"),
    ],
)
def test_who_is_wrong_gets_no_number(change, reason):
    makers = {"wrong": partial(Distorted, change), "right": partial(Distorted, lambda grad: grad)}
    wrong, right = measure_step("tiny", TINY, 4, makers, rounds=2)
    assert (wrong.reason, wrong.measurement) == (reason, None)
    assert right.reason is None
    assert len(right.measurement.ratios) == 2


def test_wrong_norms_are_wrong():
    net, x, y, truth = truth_of("tiny")
    stepper = STEPPERS["psgrad norms"](net, truth.max_norm, len(x))
    norms = stepper.norms
    stepper.norms = lambda: norms() * 1.1
    assert check(stepper, truth, x, y).reason == "wrong by 10.0%"


def test_who_would_write_too_much_is_not_run():
    net = TINY.seeded()
    size = 4 * 5 * sum(p.numel() for p in net.parameters())
    held = {name: written_bytes(make, net, 5) for name, make in STEPPERS.items()}
    assert {name for name in held if held[name] == size} == {
        *("opacus hooks", "opacus hooks + psgrad", "opacus functorch", "opacus ew", "torch.func", "backpack")
    }
    assert set(held.values()) == {0, size}
    assert written_bytes(type("New", (Written,), {}), net, 5) == size
    makers = {name: STEPPERS[name] for name in ("torch.func", "psgrad clip")}
    refused, run = measure_step("tiny", TINY, 5, makers, rounds=1, memory_limit=2 * size - 1)
    assert refused.reason.startswith("not run: 0.0 GiB of per-sample gradients")
    assert run.measurement is not None
    results = measure_step("tiny", TINY, 5, makers, rounds=1, memory_limit=2 * size)
    assert all(r.measurement for r in results)


def test_the_gate_runs_without_tf32_and_the_rest_as_pytorch_is_set(monkeypatch):
    seen = []

    class Looks(NonPrivate):
        def __init__(self, model, max_norm, batch_size):
            super().__init__(model)

        def gradient(self, x, y):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            super().gradient(x, y)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    measure_step("tiny", TINY, 4, {"looks": Looks}, rounds=1)
    assert seen[0] == (False, False)
    assert set(seen[1:]) == {(True, torch.backends.cuda.matmul.allow_tf32)}


def test_patience_and_interruption():
    makers = {"psgrad clip": STEPPERS["psgrad clip"]}
    (result,) = measure_step("tiny", TINY, 4, makers, rounds=50, seconds=0.0)
    assert len(result.measurement.ratios) == 3
    assert measure_step("tiny", TINY, 4, makers, rounds=1, stop=lambda: True) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_copy_without_in_place_compute_the_same(name):
    model = MODELS[name].seeded()
    torch.testing.assert_close(model.state_dict(), MODELS[name].seeded().state_dict())
    x, _ = MODELS[name].batch(2)
    assert x.shape == (2, *MODELS[name].image)
    plain = without_in_place(model)
    assert not any(getattr(m, "inplace", False) for m in plain.modules())
    expected = model(x)
    assert expected.shape == (2, 10)
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(model(x), expected)  # no dropout, no stochastic depth


def test_opacus_runs_the_residual_network_without_in_place():
    net, x, y, truth = truth_of("resnet18-gn", 2)
    assert check(STEPPERS["opacus ghost + psgrad"](net, truth.max_norm, 2), truth, x, y).reason is None
