"""One small member of each of torchvision's families, made by the family's own constructor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import (
    convnext,
    efficientnet,
    inception,
    mobilenetv3,
    regnet,
    resnet,
    swin_transformer,
)

from psgrad.bench.zoo import replace_batch_norm, still_random_modules, wake

CLASSES = 10


@dataclass(frozen=True)
class Tiny:
    """How to make the model, and the height and width of its images."""

    make: Callable[[], nn.Module]
    size: int = 32


def alexnet():
    return narrow(lambda: models.AlexNet(CLASSES), 256 * 6 * 6)


def vgg(batch_norm):
    layers = models.vgg.make_layers([24, "M", 40, "M", 512, "M"], batch_norm)
    return narrow(lambda: models.VGG(layers, CLASSES), 512 * 7 * 7)


def narrow(build, features):
    """Make the two hidden layers of the classifier, 4,096 wide whatever the arguments, 8 wide."""
    with torch.device("meta"):
        model = build()
    linear = [path for path, m in model.classifier.named_children() if isinstance(m, nn.Linear)]
    for path, width, outputs in zip(linear, (features, 8, 8), (8, 8, CLASSES), strict=True):
        model.classifier.set_submodule(path, nn.Linear(width, outputs))
    model.features.to_empty(device="cpu")
    for module in model.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def build_resnet(block, **width):
    return models.ResNet(block, [1, 1, 1, 1], CLASSES, **width)


def build_convnext():
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(blocks, stochastic_depth_prob=0.5, num_classes=CLASSES)


def build_efficientnet(version):
    config = efficientnet.MBConvConfig
    first = efficientnet.FusedMBConvConfig if version == 2 else config
    blocks = [first(1, 3, 1, 24, 24, 1), first(4, 3, 2, 24, 40, 2), config(6, 5, 2, 40, 56, 1)]
    return models.EfficientNet(blocks, 0.2, 0.5, CLASSES, last_channel=72)


def build_mobilenet_v3():
    config = mobilenetv3.InvertedResidualConfig
    blocks = [
        config(24, 3, 24, 24, True, "RE", 2, 1, 1),
        config(24, 3, 72, 40, False, "RE", 1, 1, 1),
        config(40, 5, 120, 40, True, "HS", 1, 1, 1),
    ]
    return models.MobileNetV3(blocks, 72, CLASSES)


def build_regnet(se_ratio):
    params = regnet.BlockParams.from_init_params(5, 24, 24, 2, 24, se_ratio=se_ratio)
    return models.RegNet(params, CLASSES, 24)


class EnlargedAux(inception.InceptionAux):
    """The auxiliary head at a map of the size that it has with images of 299 pixels, the least it takes."""

    def forward(self, x):
        return super().forward(F.interpolate(x, (17, 17)))


def build_inception():
    parts = [getattr(inception, f"Inception{letter}") for letter in "ABCDE"]
    parts = [inception.BasicConv2d, *parts, EnlargedAux]
    return models.Inception3(CLASSES, inception_blocks=parts, init_weights=False)


def build_maxvit():
    return models.MaxVit((32, 32), 24, 2, [24, 40], [1, 2], 4, 0.5, num_classes=CLASSES)


def build_vision_transformer():
    return models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=CLASSES)


def build_swin(version):
    block, merge = {
        1: (swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging),
        2: (swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2),
    }[version]
    return models.SwinTransformer(
        [4, 4],
        8,
        [2, 1],
        [2, 2],
        [3, 3],  # windows that the 8x8 patches must be padded to, and that shift
        stochastic_depth_prob=0.5,
        num_classes=CLASSES,
        block=block,
        downsample_layer=merge,
    )


TINY: dict[str, Tiny] = {
    "alexnet": Tiny(alexnet, 64),
    "convnext": Tiny(build_convnext),
    "densenet": Tiny(lambda: models.DenseNet(12, (2, 2, 2, 2), 24, num_classes=CLASSES), 64),
    "densenet, checkpointed": Tiny(
        lambda: models.DenseNet(12, (2, 2), 24, num_classes=CLASSES, memory_efficient=True)
    ),
    "efficientnet": Tiny(lambda: build_efficientnet(1)),
    "efficientnet_v2": Tiny(lambda: build_efficientnet(2)),
    "googlenet": Tiny(lambda: models.GoogLeNet(CLASSES, init_weights=False), 64),
    "inception": Tiny(build_inception, 75),
    "maxvit": Tiny(build_maxvit),
    "mnasnet": Tiny(lambda: models.MNASNet(0.1, CLASSES), 64),
    "mobilenet_v2": Tiny(lambda: models.MobileNetV2(CLASSES, 0.25), 64),
    "mobilenet_v3": Tiny(build_mobilenet_v3, 64),
    "regnet_x": Tiny(lambda: build_regnet(None)),
    "regnet_y": Tiny(lambda: build_regnet(0.5)),
    "resnet, basic blocks": Tiny(lambda: build_resnet(resnet.BasicBlock)),
    "resnet, bottlenecks": Tiny(lambda: build_resnet(resnet.Bottleneck, width_per_group=16)),
    "resnext": Tiny(lambda: build_resnet(resnet.Bottleneck, groups=4, width_per_group=4)),
    "shufflenet": Tiny(lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 72, 96, 120], CLASSES), 64),
    "squeezenet": Tiny(lambda: models.SqueezeNet("1_1", CLASSES), 64),
    "swin": Tiny(lambda: build_swin(1)),
    "swin_v2": Tiny(lambda: build_swin(2)),
    "vgg": Tiny(lambda: vgg(False)),
    "vgg_bn": Tiny(lambda: vgg(True)),
    "vision_transformer": Tiny(build_vision_transformer),
}


def make_tiny(name, samples=3, dtype=torch.double, *, random=False):
    """Model, images and labels; with `random`, dropout and stochastic depth stay as they are."""
    torch.manual_seed(0)
    tiny = TINY[name]
    model = wake(replace_batch_norm(tiny.make())).to(dtype)
    if not random:
        still_random_modules(model)
    images = torch.randn(samples, 3, tiny.size, tiny.size, dtype=dtype)
    return model, images, torch.randint(CLASSES, (samples,))
