"""Real torchvision models, nothing touched but BatchNorm, against the one-by-one loop."""

import functools

import pytest
import torch
from opacus.validators import ModuleValidator
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from psgrad import PerSampleGrads, RefusedModelError, clip_per_sample
from tests.model_oracle import grads_one_by_one, squared_loss

GROUP_NORM = functools.partial(nn.GroupNorm, 8)


def convnext():
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.0, num_classes=5)


def vision_transformer():
    return models.VisionTransformer(16, 4, 2, 2, 12, 24, num_classes=5)


def swin(**options):
    return SwinTransformer(
        [2, 2], 8, [2, 2], [1, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=5, **options
    )


def maxvit():
    norm = functools.partial(nn.GroupNorm, 4)
    return MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.0, norm_layer=norm, num_classes=5)


MODELS = {
    "resnet18": (lambda: models.resnet18(norm_layer=GROUP_NORM, num_classes=5), 32),
    "mobilenet_v3_small": (
        lambda: ModuleValidator.fix(models.mobilenet_v3_small(num_classes=5, dropout=0.0)),
        32,
    ),
    "squeezenet1_1": (lambda: models.squeezenet1_1(num_classes=5, dropout=0.0), 32),
    "convnext": (convnext, 32),
    "vision_transformer": (vision_transformer, 16),
    "swin": (swin, 16),
    "swin_v2": (lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 16),
    "maxvit": (maxvit, 32),
}


@pytest.fixture(params=MODELS)
def model_and_images(request):
    torch.manual_seed(0)
    build, size = MODELS[request.param]
    model = build().double()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)  # a head of zeros would make every gradient behind it zero
    return model, torch.randn(3, 3, size, size, dtype=torch.double)


def test_per_sample_gradients(model_and_images):
    model, x = model_and_images
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path], msg=lambda m, path=path: f"{path}: {m}")


def test_clipped_sum(model_and_images):
    model, x = model_and_images
    expected = grads_one_by_one(model, squared_loss, [x])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    factors = (norms.min() / norms).clamp(max=1)
    with clip_per_sample(model, norms.min().item()):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        total = torch.tensordot(factors, expected[path], 1) / len(x)
        torch.testing.assert_close(p.grad, total, msg=lambda m, path=path: f"{path}: {m}")


def test_batch_norm_is_refused_with_every_path():
    with pytest.raises(RefusedModelError) as refused:
        PerSampleGrads(models.resnet18())
    assert str(refused.value).count("BatchNorm2d") == 20
    assert "layer4.1.bn2" in str(refused.value)
