"""torchvision's classification models as people train them: BatchNorm replaced, nothing else touched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.ops import StochasticDepth

__all__ = [
    "build",
    "classification_loss",
    "image_size",
    "model_names",
    "outline",
    "replace_batch_norm",
    "still_random_modules",
    "wake",
]

IMAGE_SIZE = 64
"""What all but the models below take: the last feature map of a network of stride 32 has 2x2 positions."""
IMAGE_SIZES = {
    "inception_v3": 299,  # the least that leaves its auxiliary head the 5x5 map that it convolves
    "maxvit_t": 224,  # the least that its windows of 7 divide at every stage
    "vit_h_14": 56,
}


def model_names() -> list[str]:
    """Every classification model that torchvision lists."""
    return models.list_models(module=models)


def image_size(name: str) -> int:
    """Height and width in pixels of the images a model is checked with."""
    return IMAGE_SIZES.get(name, IMAGE_SIZE)


def build(name: str, *, num_classes: int = 10, replace: bool = True) -> nn.Module:
    """Make a model in training mode, without weights from elsewhere, for images of `image_size(name)`.

    Auxiliary heads are there. With `replace`, BatchNorm is replaced as `replace_batch_norm` says.
    """
    options = {"image_size": image_size(name)} if name.startswith("vit_") else {}
    model = _make(name, num_classes=num_classes, **options)
    return replace_batch_norm(model) if replace else model


def _make(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # their own initialisation takes minutes
    return models.get_model(name, weights=None, **options)


def replace_batch_norm(model: nn.Module) -> nn.Module:
    """Put what `ModuleValidator.fix` makes of each BatchNorm in its place; all else stays.

    `fix` on a whole model would replace `nn.MultiheadAttention` as well.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            model.set_submodule(path, ModuleValidator.fix(module))
    return model


def outline(name: str) -> nn.Module:
    """Make the model as published, BatchNorm left in, with large parameters that have no memory."""
    with _EmptyOnMeta():
        return _make(name)


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what layers allocate for their parameters on the meta device; computed settings stay numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


@torch.no_grad()
def wake(model: nn.Module) -> nn.Module:
    """Add noise to every parameter whose entries are all alike, in place.

    Heads of zeros and layer scales of 1e-6 would make the gradients behind them zero, or nearly, and
    a comparison empty.
    """
    for p in model.parameters():
        if p.numel() and (p == p.flatten()[0]).all():
            p.add_(0.05 * torch.randn_like(p))
    return model


def still_random_modules(model: nn.Module) -> nn.Module:
    """Put the modules that draw random numbers (dropout, stochastic depth), and no others, in eval mode."""
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, StochasticDepth)):
            module.eval()
    return model


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the model's output, 0.3 of that of each auxiliary head's added."""
    out = model(images)
    heads = (out,) if isinstance(out, Tensor) else tuple(head for head in out if head is not None)
    first, *auxiliary = (F.cross_entropy(head, labels) for head in heads)
    return first + 0.3 * sum(auxiliary)
