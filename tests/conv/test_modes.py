"""The verbs in modes of PyTorch's, and after them: what a call leaves behind serves every other call."""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from psgrad.conv import (
    ConvGeometry,
    at_once,
    weight_grad_sq_norms,
    weight_grad_sq_norms_and_sum,
    weight_grads,
    weighted_weight_grad,
)
from psgrad.conv.scratch import _blocks
from psgrad.conv.strategies.gram import mapped
from psgrad.errors import StrategyError

GEOMETRY = ConvGeometry((3, 3), padding=1)
LAYERS = {"by chunks": (3, 5, 8), "of large maps": (3, 8, 16), "by Gram matrices": (64, 64, 2)}


def operands(layer):
    inputs, outputs, size = LAYERS[layer]
    torch.manual_seed(0)
    return (
        torch.randn(4, inputs, size, size, device="cpu"),
        torch.randn(4, outputs, size, size, device="cpu"),
        (outputs, inputs, 3, 3),
        GEOMETRY,
    )


def everything(args, strategy="auto"):
    factors = torch.tensor([0.5, 1.0, 0.0, 2.0], device="cpu")
    return [
        weight_grads(*args, strategy if strategy != "gram" else "auto"),
        weight_grad_sq_norms(*args, strategy),
        weighted_weight_grad(*args, factors),
        *weight_grad_sq_norms_and_sum(*args),
    ]


MODES = {
    "inference": torch.inference_mode,
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", MODES)
def test_inside_of_a_mode_and_after_it(mode, layer):
    args = operands(layer)
    expected = everything(args)
    _blocks.by_purpose.clear()
    mapped._meets.cache_clear()
    mapped._matrix.cache_clear()
    with MODES[mode]():
        found = everything(args)
    for results in (found, everything(args)):
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right)


@pytest.mark.parametrize("strategy", ["loop", "grouped", "unfold"])
def test_autocast_does_not_reach_into_a_strategy(strategy):
    args = operands("by chunks")
    expected = everything(args, strategy)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(args, strategy)
    for result, right in zip(found, expected, strict=True):
        torch.testing.assert_close(result, right)


@pytest.mark.parametrize("layer", LAYERS)
def test_after_fake_tensors(layer, monkeypatch):
    monkeypatch.setattr(at_once, "at_once", lambda problem: None)  # norms and sum are each on their own
    mapped._meets.cache_clear()
    mapped._matrix.cache_clear()
    mapped.few_positions.cache_clear()
    at_once._ones.cache_clear()
    x, grad, *shape = operands(layer)
    for compute in (weight_grad_sq_norms, weight_grad_sq_norms_and_sum):
        with FakeTensorMode() as mode, contextlib.suppress(Exception):  # no values, no norms
            compute(mode.from_tensor(x), mode.from_tensor(grad), *shape)
    expected = weight_grads(x, grad, *shape)
    norms, total = weight_grad_sq_norms_and_sum(x, grad, *shape)
    torch.testing.assert_close(total, expected.sum(0), rtol=1e-4, atol=1e-4)
    for found in (norms, weight_grad_sq_norms(x, grad, *shape)):
        torch.testing.assert_close(found, expected.flatten(1).square().sum(1))


@pytest.mark.parametrize("layer", LAYERS)
def test_factors_that_change_without_a_trace(layer):
    args = operands(layer)
    grads = weight_grads(*args)
    values = np.ones(4, dtype=np.float32)
    factors = torch.from_numpy(values)
    for change in (lambda: None, lambda: values.__setitem__(0, 0), lambda: factors.data.mul_(0.5)):
        change()
        expected = torch.einsum("n,n...->...", factors, grads)
        torch.testing.assert_close(weighted_weight_grad(*args, factors), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        inferred = torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = torch.einsum("n,n...->...", inferred, grads)
    torch.testing.assert_close(weighted_weight_grad(*args, inferred), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_what_is_not_floating_point(dtype):
    x, grad, *shape = operands("by chunks")
    with pytest.raises(StrategyError, match=str(dtype)):
        weight_grads(x.to(dtype), grad.to(dtype), *shape)


def test_no_output_channels():
    """PyTorch's own weight gradient refuses them."""
    x, grad = torch.randn(1, 16, 4, 4, 4), torch.zeros(1, 0, 4, 4, 4)
    shape = (0, 16, 3, 3, 3), ConvGeometry((3, 3, 3), padding=1)
    assert weight_grads(x, grad, *shape, "unfold").shape == (1, 0, 16, 3, 3, 3)
    assert weight_grad_sq_norms(x, grad, *shape, "unfold").tolist() == [0.0]


def test_timing_draws_no_random_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("PSGRAD_CACHE", str(tmp_path))
    args = operands("by chunks")
    torch.manual_seed(0)
    weight_grads(*args, "measure")
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == drawn
