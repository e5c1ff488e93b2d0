"""Modules that compute layers by function, with weights as they are or computed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.layers.grouped_linear import grouped_linear


def shapes(*weight, bias=None):
    return {"weight": weight} if bias is None else {"weight": weight, "bias": (bias,)}


class ByFunction(nn.Module):
    """Runs `use(self, h)` with parameters of these shapes."""

    def __init__(self, use, parameters):
        super().__init__()
        self.use = use
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)
        self.register_buffer("mask", torch.rand(6, 4, 3, 3).round())

    def forward(self, h):
        return self.use(self, h)


def standardised(weight):
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    return centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-4).sqrt()


@torch.no_grad()
def unrecorded(weight):
    return weight.abs().mean((1, 2, 3)).view(-1, 1, 1)


SEQUENCE, IMAGES, VOLUMES = (4, 7), (4, 6, 5), (4, 3, 4, 3)
WEIGHTS = shapes(6, 4, 3, 3, bias=6)
AS_THEY_ARE = {
    "linear": (F.linear, (5, 4), lambda self, h: F.linear(h, self.weight, self.bias), shapes(3, 4, bias=3)),
    "grouped_linear": (
        grouped_linear,
        (2, 5, 4),
        lambda self, h: grouped_linear(h, self.weight),
        shapes(2, 3, 4),
    ),
    "linear, of vectors": (F.linear, (4,), lambda self, h: F.linear(h, self.weight), shapes(3, 4)),
    "a product": (torch.matmul, (5, 4), lambda self, h: torch.matmul(h, self.weight), shapes(4, 3)),
    "a product, by method": (Tensor.matmul, (4,), lambda self, h: h.matmul(self.weight), shapes(4, 3)),
    "mm": (torch.mm, (4,), lambda self, h: torch.mm(h, mat2=self.weight), shapes(4, 3)),
    "mm, by method": (Tensor.mm, (4,), lambda self, h: h.mm(self.weight), shapes(4, 3)),
    "a product, named": (
        torch.matmul,
        (5, 4),
        lambda self, h: torch.matmul(input=h, other=self.weight),
        shapes(4, 3),
    ),
    "a product, by operator": (
        Tensor.__matmul__,
        (5, 4),
        lambda self, h: h @ self.weight @ self.weight.T,
        shapes(4, 4),
    ),
    "conv1d": (F.conv1d, SEQUENCE, lambda self, h: F.conv1d(h, self.weight, padding=2), shapes(6, 4, 3)),
    "conv2d": (
        F.conv2d,
        IMAGES,
        lambda self, h: F.conv2d(h, self.weight, self.bias, [2, 1], "valid", (1, 2)),
        WEIGHTS,
    ),
    "conv2d, same": (
        F.conv2d,
        IMAGES,
        lambda self, h: F.conv2d(h, self.weight, padding="same"),
        shapes(6, 4, 2, 3),
    ),
    "conv2d, named": (
        F.conv2d,
        IMAGES,
        lambda self, h: torch.conv2d(input=F.pad(h, (1, 0)), bias=self.bias, weight=self.weight, groups=2),
        shapes(6, 2, 3, 3, bias=6),
    ),
    "conv3d": (F.conv3d, VOLUMES, lambda self, h: F.conv3d(h, self.weight, stride=2), shapes(2, 4, 2, 2, 1)),
    "conv_transpose1d": (
        F.conv_transpose1d,
        SEQUENCE,
        lambda self, h: F.conv_transpose1d(h, self.weight, self.bias, 2, 1, 1, 2),
        shapes(4, 3, 3, bias=6),
    ),
    "conv_transpose2d": (
        F.conv_transpose2d,
        IMAGES,
        lambda self, h: F.conv_transpose2d(h, self.weight, dilation=2, stride=[3, 2], output_padding=(2, 1)),
        shapes(4, 2, 3, 2),
    ),
    "conv_transpose3d": (
        F.conv_transpose3d,
        VOLUMES,
        lambda self, h: F.conv_transpose3d(h, self.weight, padding=1),
        shapes(4, 2, 3, 3, 2),
    ),
    "layer_norm": (
        F.layer_norm,
        (5, 4),
        lambda self, h: F.layer_norm(h, [4], self.weight, self.bias, 1e-3),
        shapes(4, bias=4),
    ),
    "torch.layer_norm": (
        torch.layer_norm,
        (5, 4),
        lambda self, h: torch.layer_norm(h, (4,), self.weight),
        shapes(4),
    ),
    "rms_norm": (F.rms_norm, (5, 4), lambda self, h: F.rms_norm(h, (4,), self.weight, 1e-3), shapes(4)),
    "torch.rms_norm": (
        torch.rms_norm,
        (5, 4),
        lambda self, h: torch.rms_norm(h, (4,), self.weight),
        shapes(4),
    ),
    "group_norm": (
        F.group_norm,
        IMAGES,
        lambda self, h: F.group_norm(h, 2, self.weight, self.bias),
        shapes(4, bias=4),
    ),
    "torch.group_norm": (
        torch.group_norm,
        IMAGES,
        lambda self, h: torch.group_norm(h, 2, self.weight, None, 1e-3),
        shapes(4),
    ),
    "batch_norm, its statistics given": (
        F.batch_norm,
        IMAGES,
        lambda self, h: F.batch_norm(h, self.mean, self.variance, self.weight, self.bias, False),
        shapes(4, bias=4),
    ),
    "embedding": (
        F.embedding,
        (4,),
        lambda self, h: F.embedding(h.argsort(-1), self.weight, 2) * h.mean(1)[:, None, None],
        shapes(4, 3),
    ),
}
FROM_OTHERS = {
    "addcmul": (
        torch.addcmul,
        (5, 4),
        lambda self, h: torch.addcmul(self.bias.view(1, 1, 4), self.weight, h),
        shapes(4, bias=4),
    ),
    "addcmul, to the batch": (
        torch.addcmul,
        (5, 4),
        lambda self, h: torch.addcmul(tensor1=h.sin(), tensor2=self.weight, input=h, value=0.5),
        shapes(4),
    ),
    "bilinear": (
        F.bilinear,
        (4,),
        lambda self, h: F.bilinear(h, h[:, :3].sin(), self.weight, self.bias),
        shapes(2, 4, 3, bias=2),
    ),
    "prelu": (F.prelu, IMAGES, lambda self, h: F.prelu(h, self.weight), shapes(4)),
    "prelu, one slope": (F.prelu, (4,), lambda self, h: F.prelu(h, self.weight) + h, shapes(1)),
    "embedding_bag": (
        F.embedding_bag,
        (4,),
        lambda self, h: F.embedding_bag(
            h.argsort(-1), self.weight, mode="sum", per_sample_weights=h.sigmoid()
        ),
        shapes(5, 3),
    ),
    "embedding_bag, mean": (
        F.embedding_bag,
        (4,),
        lambda self, h: F.embedding_bag(h.argsort(-1)[:, 1:], self.weight, padding_idx=-5) * h[:, :1],
        shapes(5, 3),
    ),
    "embedding_bag, max": (
        F.embedding_bag,
        (4,),
        lambda self, h: (
            F.embedding_bag(h.argsort(-1)[:, :2], self.weight, mode="max", padding_idx=1) * h[:, :1]
        ),
        shapes(5, 3),
    ),
}
COMPUTED = {
    "standardised": (IMAGES, lambda self, h: F.conv2d(h, standardised(self.weight), self.bias), WEIGHTS),
    "standardised as timm does": (
        IMAGES,
        lambda self, h: F.conv2d(
            h,
            F.batch_norm(self.weight.view(1, 6, -1), None, None, (self.bias * 0.3).view(-1), training=True)
            .reshape_as(self.weight)
            .contiguous(),
        ),
        WEIGHTS,
    ),
    "masked": (IMAGES, lambda self, h: F.conv2d(h, self.weight * self.mask, self.bias.exp()), WEIGHTS),
    "equalised": (IMAGES, lambda self, h: F.conv_transpose2d(h, (self.weight * 0.2).mT), shapes(4, 2, 3, 2)),
    "low rank": (
        (5, 4),
        lambda self, h: F.linear(h, self.weight @ self.weight.T + self.bias.diag()),
        shapes(4, 2, bias=4),
    ),
    "one plus": (
        (5, 4),
        lambda self, h: F.layer_norm(h, (4,), 1 + self.weight, self.weight),
        shapes(4),
    ),
    "parts of one": (
        (5, 4),
        lambda self, h: F.linear(h, self.weight[:, :4], self.weight.split([4, 1], 1)[1].squeeze(1)),
        shapes(3, 5),
    ),
    "twice": (
        IMAGES,
        lambda self, h: (
            F.conv2d(h, self.weight.tanh(), padding=1)
            + F.conv2d(h.sin(), self.weight.tanh(), self.bias, padding=1)
        ),
        WEIGHTS,
    ),
    "with its norm as a number": (
        IMAGES,
        lambda self, h: F.conv2d(h, self.weight / self.weight.detach().norm().item(), self.bias),
        WEIGHTS,
    ),
    "a detached part": (
        IMAGES,
        lambda self, h: F.conv2d(h, self.weight.detach() + self.bias.view(-1, 1, 1, 1)) * self.weight.mean(),
        WEIGHTS,
    ),
    "constant, with a bias": (IMAGES, lambda self, h: F.conv2d(h, self.mask, self.bias), {"bias": (6,)}),
    "of a norm": (
        IMAGES,
        lambda self, h: F.group_norm(h, 2, 1 + self.weight, self.bias),
        shapes(4, bias=4),
    ),
    "a bias": (IMAGES, lambda self, h: F.conv2d(h, self.weight, self.bias.exp()), WEIGHTS),
    "unrecorded": (
        IMAGES,
        lambda self, h: F.conv2d(h, self.weight, self.bias) * unrecorded(self.weight),
        WEIGHTS,
    ),
    "a weight, and by samples": (
        (5, 4),
        lambda self, h: F.linear(h, self.weight.exp()) * self.weight.exp()[:, 0],
        shapes(4, 4),
    ),
}


def shape_of(name):
    return {**CASES, **COMPUTED}[name][0]


def model_of(name):
    torch.manual_seed(0)
    shape, use, parameters = {**CASES, **COMPUTED}[name]
    first = nn.Linear(4, 4) if shape[-1] == 4 else nn.Identity()
    model = nn.Sequential(first, nn.Tanh(), ByFunction(use, parameters)).double()
    return model, lambda n: torch.randn(n, *shape, dtype=torch.double)


CASES = {name: case[1:] for name, case in {**AS_THEY_ARE, **FROM_OTHERS}.items()}
ALL = [*CASES, *COMPUTED]
