"""The convolutions that are measured: each network's distinct layers, in literal named sets."""

from __future__ import annotations

from psgrad.bench.cases import ConvCase

__all__ = ["CASE_SETS", "QUICK_CASES"]

CASE_SETS: dict[str, tuple[ConvCase, ...]] = {
    "resnet18-32": (
        ConvCase("3-64 3x3 @32", 3, 64, (32, 32), 3, padding=1),
        ConvCase("64-64 3x3 @32", 64, 64, (32, 32), 3, padding=1),
        ConvCase("64-128 3x3/2 @32", 64, 128, (32, 32), 3, stride=2, padding=1),
        ConvCase("128-128 3x3 @16", 128, 128, (16, 16), 3, padding=1),
        ConvCase("64-128 1x1/2 @32", 64, 128, (32, 32), 1, stride=2),
        ConvCase("128-256 3x3/2 @16", 128, 256, (16, 16), 3, stride=2, padding=1),
        ConvCase("256-256 3x3 @8", 256, 256, (8, 8), 3, padding=1),
        ConvCase("128-256 1x1/2 @16", 128, 256, (16, 16), 1, stride=2),
        ConvCase("256-512 3x3/2 @8", 256, 512, (8, 8), 3, stride=2, padding=1),
        ConvCase("512-512 3x3 @4", 512, 512, (4, 4), 3, padding=1),
        ConvCase("256-512 1x1/2 @8", 256, 512, (8, 8), 1, stride=2),
    ),
    "resnet50-224": (
        ConvCase("3-64 7x7/2 @224", 3, 64, (224, 224), 7, stride=2, padding=3),
        ConvCase("64-64 1x1 @56", 64, 64, (56, 56), 1),
        ConvCase("64-64 3x3 @56", 64, 64, (56, 56), 3, padding=1),
        ConvCase("64-256 1x1 @56", 64, 256, (56, 56), 1),
        ConvCase("256-64 1x1 @56", 256, 64, (56, 56), 1),
        ConvCase("256-128 1x1 @56", 256, 128, (56, 56), 1),
        ConvCase("128-128 3x3/2 @56", 128, 128, (56, 56), 3, stride=2, padding=1),
        ConvCase("128-512 1x1 @28", 128, 512, (28, 28), 1),
        ConvCase("256-512 1x1/2 @56", 256, 512, (56, 56), 1, stride=2),
        ConvCase("512-128 1x1 @28", 512, 128, (28, 28), 1),
        ConvCase("128-128 3x3 @28", 128, 128, (28, 28), 3, padding=1),
        ConvCase("512-256 1x1 @28", 512, 256, (28, 28), 1),
        ConvCase("256-256 3x3/2 @28", 256, 256, (28, 28), 3, stride=2, padding=1),
        ConvCase("256-1024 1x1 @14", 256, 1024, (14, 14), 1),
        ConvCase("512-1024 1x1/2 @28", 512, 1024, (28, 28), 1, stride=2),
        ConvCase("1024-256 1x1 @14", 1024, 256, (14, 14), 1),
        ConvCase("256-256 3x3 @14", 256, 256, (14, 14), 3, padding=1),
        ConvCase("1024-512 1x1 @14", 1024, 512, (14, 14), 1),
        ConvCase("512-512 3x3/2 @14", 512, 512, (14, 14), 3, stride=2, padding=1),
        ConvCase("512-2048 1x1 @7", 512, 2048, (7, 7), 1),
        ConvCase("1024-2048 1x1/2 @14", 1024, 2048, (14, 14), 1, stride=2),
        ConvCase("2048-512 1x1 @7", 2048, 512, (7, 7), 1),
        ConvCase("512-512 3x3 @7", 512, 512, (7, 7), 3, padding=1),
    ),
    "wrn-16-4": (
        ConvCase("3-16 3x3 @32", 3, 16, (32, 32), 3, padding=1),
        ConvCase("16-64 3x3 @32", 16, 64, (32, 32), 3, padding=1),
        ConvCase("64-64 3x3 @32", 64, 64, (32, 32), 3, padding=1),
        ConvCase("16-64 1x1 @32", 16, 64, (32, 32), 1),
        ConvCase("64-128 3x3/2 @32", 64, 128, (32, 32), 3, stride=2, padding=1),
        ConvCase("128-128 3x3 @16", 128, 128, (16, 16), 3, padding=1),
        ConvCase("64-128 1x1/2 @32", 64, 128, (32, 32), 1, stride=2),
        ConvCase("128-256 3x3/2 @16", 128, 256, (16, 16), 3, stride=2, padding=1),
        ConvCase("256-256 3x3 @8", 256, 256, (8, 8), 3, padding=1),
        ConvCase("128-256 1x1/2 @16", 128, 256, (16, 16), 1, stride=2),
    ),
    "vgg11-32": (
        ConvCase("3-64 3x3 @32", 3, 64, (32, 32), 3, padding=1),
        ConvCase("64-128 3x3 @16", 64, 128, (16, 16), 3, padding=1),
        ConvCase("128-256 3x3 @8", 128, 256, (8, 8), 3, padding=1),
        ConvCase("256-256 3x3 @8", 256, 256, (8, 8), 3, padding=1),
        ConvCase("256-512 3x3 @4", 256, 512, (4, 4), 3, padding=1),
        ConvCase("512-512 3x3 @4", 512, 512, (4, 4), 3, padding=1),
        ConvCase("512-512 3x3 @2", 512, 512, (2, 2), 3, padding=1),
    ),
    "convnext-depthwise": (
        ConvCase("3-96 4x4/4 @224", 3, 96, (224, 224), 4, stride=4),
        ConvCase("96-96 7x7 g96 @56", 96, 96, (56, 56), 7, padding=3, groups=96),
        ConvCase("96-192 2x2/2 @56", 96, 192, (56, 56), 2, stride=2),
        ConvCase("192-192 7x7 g192 @28", 192, 192, (28, 28), 7, padding=3, groups=192),
        ConvCase("192-384 2x2/2 @28", 192, 384, (28, 28), 2, stride=2),
        ConvCase("384-384 7x7 g384 @14", 384, 384, (14, 14), 7, padding=3, groups=384),
        ConvCase("384-768 2x2/2 @14", 384, 768, (14, 14), 2, stride=2),
        ConvCase("768-768 7x7 g768 @7", 768, 768, (7, 7), 7, padding=3, groups=768),
    ),
    "resnext-grouped": (
        ConvCase("128-128 3x3 g32 @56", 128, 128, (56, 56), 3, padding=1, groups=32),
        ConvCase("256-256 3x3/2 g32 @56", 256, 256, (56, 56), 3, stride=2, padding=1, groups=32),
        ConvCase("256-256 3x3 g32 @28", 256, 256, (28, 28), 3, padding=1, groups=32),
        ConvCase("512-512 3x3/2 g32 @28", 512, 512, (28, 28), 3, stride=2, padding=1, groups=32),
        ConvCase("512-512 3x3 g32 @14", 512, 512, (14, 14), 3, padding=1, groups=32),
        ConvCase("1024-1024 3x3/2 g32 @14", 1024, 1024, (14, 14), 3, stride=2, padding=1, groups=32),
        ConvCase("1024-1024 3x3 g32 @7", 1024, 1024, (7, 7), 3, padding=1, groups=32),
    ),
    "unet-transposed": (
        ConvCase("transposed 1024-512 2x2/2 @8", 1024, 512, (8, 8), 2, stride=2, transposed=True),
        ConvCase("transposed 512-256 2x2/2 @16", 512, 256, (16, 16), 2, stride=2, transposed=True),
        ConvCase("transposed 256-128 2x2/2 @32", 256, 128, (32, 32), 2, stride=2, transposed=True),
        ConvCase("transposed 128-64 2x2/2 @64", 128, 64, (64, 64), 2, stride=2, transposed=True),
        ConvCase("transposed 100-512 4x4 @1", 100, 512, (1, 1), 4, transposed=True),
        ConvCase("transposed 512-256 4x4/2 @4", 512, 256, (4, 4), 4, stride=2, padding=1, transposed=True),
        ConvCase("transposed 256-128 4x4/2 @8", 256, 128, (8, 8), 4, stride=2, padding=1, transposed=True),
        ConvCase("transposed 128-64 4x4/2 @16", 128, 64, (16, 16), 4, stride=2, padding=1, transposed=True),
        ConvCase("transposed 64-3 4x4/2 @32", 64, 3, (32, 32), 4, stride=2, padding=1, transposed=True),
    ),
    "audio-conv1d": (
        ConvCase("1-32 80/16 @16000", 1, 32, (16000,), 80, stride=16),
        ConvCase("32-32 3 @249", 32, 32, (249,), 3),
        ConvCase("32-64 3 @61", 32, 64, (61,), 3),
        ConvCase("64-64 3 @14", 64, 64, (14,), 3),
        ConvCase("1-128 10/5 @8000", 1, 128, (8000,), 10, stride=5),
        ConvCase("128-128 3/2 @1599", 128, 128, (1599,), 3, stride=2),
        ConvCase("128-128 3/2 @799", 128, 128, (799,), 3, stride=2),
        ConvCase("128-128 3/2 @399", 128, 128, (399,), 3, stride=2),
        ConvCase("128-128 3/2 @199", 128, 128, (199,), 3, stride=2),
        ConvCase("128-128 2/2 @99", 128, 128, (99,), 2, stride=2),
        ConvCase("128-128 2/2 @49", 128, 128, (49,), 2, stride=2),
        ConvCase("64-64 2 @1024", 64, 64, (1024,), 2),
        ConvCase("64-64 2 d16 @1023", 64, 64, (1023,), 2, dilation=16),
        ConvCase("64-64 2 d128 @1007", 64, 64, (1007,), 2, dilation=128),
    ),
    "video-conv3d": (
        ConvCase(
            "3-64 3x7x7/1x2x2 @8x56x56", 3, 64, (8, 56, 56), (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3)
        ),
        ConvCase("64-64 3x3x3 @8x28x28", 64, 64, (8, 28, 28), 3, padding=1),
        ConvCase("64-128 3x3x3/2 @8x28x28", 64, 128, (8, 28, 28), 3, stride=2, padding=1),
        ConvCase("128-128 3x3x3 @4x14x14", 128, 128, (4, 14, 14), 3, padding=1),
        ConvCase("64-128 1x1x1/2 @8x28x28", 64, 128, (8, 28, 28), 1, stride=2),
        ConvCase("128-256 3x3x3/2 @4x14x14", 128, 256, (4, 14, 14), 3, stride=2, padding=1),
        ConvCase("256-256 3x3x3 @2x7x7", 256, 256, (2, 7, 7), 3, padding=1),
        ConvCase("128-256 1x1x1/2 @4x14x14", 128, 256, (4, 14, 14), 1, stride=2),
        ConvCase("256-512 3x3x3/2 @2x7x7", 256, 512, (2, 7, 7), 3, stride=2, padding=1),
        ConvCase("512-512 3x3x3 @1x4x4", 512, 512, (1, 4, 4), 3, padding=1),
        ConvCase("256-512 1x1x1/2 @2x7x7", 256, 512, (2, 7, 7), 1, stride=2),
    ),
    "tiny": (
        ConvCase("tiny 2-3 3x3 @5", 2, 3, (5, 5), 3, padding=1),
        ConvCase("tiny 2-2 3 g2 @7", 2, 2, (7,), 3, groups=2),
        ConvCase("tiny transposed 3-2 2x2/2 @3", 3, 2, (3, 3), 2, stride=2, transposed=True),
    ),
}
"""Distinct layers by network. ResNets, WRN, VGG, ConvNeXt, ResNeXt and the 3-D ResNet as torchvision has them
(ResNet-18 with the small stem that 32x32 images get, video of 8 frames of 56x56); the decoders of a U-Net
and of a DCGAN; M5, a small wav2vec encoder and WaveNet's dilations. "tiny" is for trying the benchmark."""

QUICK_CASES: dict[str, tuple[ConvCase, ...]] = {
    name: (cases[1], cases[len(cases) // 2]) for name, cases in CASE_SETS.items() if name != "tiny"
}
"""Two layers of each network: the second, for first ones are alike, and one from the middle."""
