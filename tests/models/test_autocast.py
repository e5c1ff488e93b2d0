"""Under bf16 autocast, in either memory format: as the one-by-one loop under the same autocast.

The loop makes the same roundings to bfloat16 but for the order of sums, whose results are rounded again: two
results of one sum are at most two units of 2**-8 apart, and so are per-sample gradients as a whole. Through
a network of this depth bfloat16 itself is 5 to 20 times as far from float64, where psgrad has to be no
farther than the loop.
"""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck

from psgrad import GradNorms, PerSampleGrads, clip_per_sample
from tests.model_oracle import grads_one_by_one

U = 2.0**-8  # of bfloat16: the most that one rounding changes a number by, in parts of it
SAMPLES = 4
GROUP_NORM = functools.partial(nn.GroupNorm, 8)


def resnet(block):
    return models.ResNet(block, [1, 1, 1, 1], num_classes=5, norm_layer=GROUP_NORM)


def vision_transformer():
    return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)


def convnext():
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.0, layer_scale=0.5, num_classes=5)


MODELS = {
    "resnet": lambda: resnet(BasicBlock),
    "bottleneck": lambda: resnet(Bottleneck),
    "vision_transformer": vision_transformer,
    "convnext": convnext,
}


def loss_of(model, x, y):
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.float32):
        return F.cross_entropy(model(x), y)


@dataclass
class Problem:
    """A model with its batch, and every sample's gradient, `[N, all parameters]`, by the two loops."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loop: Tensor
    exact: Tensor

    def backward(self) -> None:
        loss_of(self.model, *self.batch).backward()

    def far_from_exact(self, got: Tensor, exact: Tensor, loop: Tensor) -> bool:
        return bool((distance(got, exact) > 1.1 * distance(loop, exact) + U).any())


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(
    params=[(name, layout) for name in MODELS for layout in LAYOUTS], ids="-".join, scope="module"
)
def looped(request):
    name, layout = request.param
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)  # a head of zeros would make every gradient behind it zero
    model = model.to(memory_format=LAYOUTS[layout])
    x = torch.randn(SAMPLES, 3, 32, 32).to(memory_format=LAYOUTS[layout])
    y = torch.randint(0, 5, (SAMPLES,))
    exact = grads_one_by_one(copy.deepcopy(model).double(), loss_of, [x.double(), y])
    return Problem(
        model, (x, y), rows(grads_one_by_one(model, loss_of, [x, y]).values()), rows(exact.values())
    )


@pytest.fixture
def problem(looped):
    looped.model.zero_grad()
    return looped


def rows(grads):
    """Put the parameters beside each other, in float64: `[N, all]`."""
    return torch.cat([g.double().flatten(1) for g in grads], 1)


def distance(got, expected):
    """In parts of what was expected, sample by sample."""
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_per_sample_gradients(problem):
    with PerSampleGrads(problem.model):
        problem.backward()
    got = rows(p.grad_sample for p in problem.model.parameters())
    assert distance(got, problem.loop).max() < 2 * U
    assert not problem.far_from_exact(got, problem.exact, problem.loop)


def test_norms(problem):
    with GradNorms(problem.model) as monitor:
        problem.backward()
    assert monitor.norms.dtype == torch.float32
    expected = problem.loop.norm(dim=1)
    torch.testing.assert_close(monitor.norms.double(), expected, rtol=U, atol=0)
    grad = torch.cat([p.grad.double().flatten() for p in problem.model.parameters()])
    assert distance(grad, problem.loop.mean(0)) < 2 * U


def test_clipped_gradients(problem):
    bound = problem.loop.norm(dim=1).min().item()
    with clip_per_sample(problem.model, bound):
        problem.backward()
    got = torch.cat([p.grad.double().flatten() for p in problem.model.parameters()])
    expected, exact = (
        (g * (bound / g.norm(dim=1)).clamp(max=1)[:, None]).mean(0) for g in (problem.loop, problem.exact)
    )
    assert distance(got, expected) < 2 * U
    assert not problem.far_from_exact(got, exact, expected)
    assert got.norm() <= bound * (1 + 2 * U)
