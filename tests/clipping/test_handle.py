"""The clipping hook: factors, bounds, what lands in p.grad, and how it goes away."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from psgrad import ConfigError, GradNorms, PerSampleGrads, clip_per_sample
from psgrad.clipping import clip_factors


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 3)
    )
    return model.double(), torch.randn(6, 3, 5, 5, dtype=torch.double), torch.randint(3, (6,))


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_with_infinite_norm_the_gradient_is_the_ordinary_one(reduction):
    model, x, y = make()
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    ordinary = grads_of(model)
    model.zero_grad()
    with clip_per_sample(model, float("inf"), reduction) as clip:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, ordinary[name])
    assert not clip.result.clipped.any()


def test_mean_and_sum_clip_the_same_gradients():
    model, x, y = make()
    seen = []
    for reduction in ("mean", "sum"):
        with clip_per_sample(model, 0.5, reduction) as clip:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
        seen.append((clip.result.norms, grads_of(model)))
        model.zero_grad()
    torch.testing.assert_close(seen[0][0], seen[1][0])
    for name in seen[0][1]:
        torch.testing.assert_close(len(x) * seen[0][1][name], seen[1][1][name])


def test_gradients_of_several_backward_passes_add_up():
    model, x, y = make()
    with clip_per_sample(model, 0.5, "sum"):
        F.cross_entropy(model(x), y, reduction="sum").backward()
        whole = grads_of(model)
        model.zero_grad()
        for part in (slice(0, 4), slice(4, 6)):
            F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, whole[name])


def test_an_empty_batch_adds_nothing():
    model, x, y = make()
    with clip_per_sample(model, 0.5, "sum") as clip:
        F.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    assert clip.result.norms.shape == (0,)
    assert not any(grad.any() for grad in grads_of(model).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_left_out_and_reported(bad):
    model, x, y = make()
    with clip_per_sample(model, 0.5, "sum") as clip:
        F.cross_entropy(model(x[1:]), y[1:], reduction="sum").backward()
        healthy = grads_of(model)
        model.zero_grad()
        x[0, 0, 0, 0] = bad
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert clip.result.non_finite.tolist() == [True] + [False] * 5
    assert clip.result.clipped[0]
    for name, grad in grads_of(model).items():
        torch.testing.assert_close(grad, healthy[name])


@given(
    norms=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=8),
    bound=st.floats(1e-6, 1e6),
)
def test_factors_keep_the_bound(norms, bound):
    norms = torch.tensor(norms)
    factors = clip_factors(norms, bound)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert (factors.double() * norms.double() <= bound * (1 + 1e-6)).all()
    assert (factors[norms <= bound * (1 - 1e-6)] == 1).all()


def test_factors_at_the_edges():
    norms = torch.tensor([0.0, float("inf"), float("nan"), 2.0])
    assert clip_factors(norms, 1.0).tolist() == [1, 0, 0, 0.5]
    assert clip_factors(norms, float("inf")).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
def test_a_norm_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match="max_norm"):
        clip_per_sample(nn.Linear(2, 2), wrong)


def test_a_reduction_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="none"):
        clip_per_sample(nn.Linear(2, 2), 1.0, "none")


def test_there_is_no_result_before_a_backward_pass():
    with clip_per_sample(nn.Linear(2, 2), 1.0) as clip, pytest.raises(ConfigError, match="no backward"):
        _ = clip.result


def test_the_result_carries_its_bound():
    model, x, y = make()
    with clip_per_sample(model, 0.25) as clip:
        F.cross_entropy(model(x), y).backward()
    assert clip.result.l2_bound == 0.25


def test_no_ordinary_weight_gradient_is_computed_as_well():
    """The floor in FLOPs: what computes a layer's input gradient leaves its weight gradient out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten())
    masks = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    with clip_per_sample(model, 0.5):
        loss = model(torch.randn(6, 3, 7, 7)).square().mean()
        with Count():
            loss.backward()
    # the first layer needs no input gradient; a strategy may call the operator for the weight alone
    assert masks.count((True, False, False)) == 1
    assert all(mask in {(True, False, False), (False, True, False)} for mask in masks)


@pytest.mark.parametrize("attach", [partial(clip_per_sample, max_norm=torch.inf), GradNorms, PerSampleGrads])
@pytest.mark.parametrize("of_model", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
def test_gradients_lie_in_memory_as_their_parameters_do(attach, of_model, of_input) -> None:
    """As autograd's do: an optimizer's fused kernels read both side by side."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3)).to(memory_format=of_model)
    x = torch.randn(4, 16, 12, 12).to(memory_format=of_input)
    model(x).square().mean().backward()
    ordinary = [p.grad for p in model.parameters()]
    model.zero_grad()
    with attach(model):
        model(x).square().mean().backward()
    for p, grad in zip(model.parameters(), ordinary, strict=True):
        assert p.grad.stride() == grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
