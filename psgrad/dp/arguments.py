"""What the arguments of Opacus's engine come to here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.utils.data import DataLoader

from psgrad.clipping import ClippingStyle, PerLayer, as_style
from psgrad.errors import ConfigError, RefusedModelError

__all__ = [
    "ADAPTIVE",
    "MODES",
    "MaxGradNorm",
    "expected_batch_size",
    "refuse_closures",
    "refuse_half_precision",
    "refuse_options",
    "style_of",
    "unwrapped",
]

MODES = ("hooks", "functorch", "ew", "ghost")
"""Opacus's ways of computing: here all are the planner's, and "ghost" returns the criterion as well."""

ADAPTIVE = {
    "target_unclipped_quantile": "quantile",
    "clipbound_learning_rate": "learning_rate",
    "unclipped_num_std": "count_noise",
    "min_clipbound": "left out, as its bound has no limits",
    "max_clipbound": "left out, as its bound has no limits",
}
"""Options of Opacus's adaptive clipping, and what they are here."""

MaxGradNorm = float | Sequence[float] | ClippingStyle


def expected_batch_size(data_loader: DataLoader[Any], sample_rate: float) -> int:
    """Return q times the number of samples, as Opacus a whole number, rounded down."""
    expected = len(data_loader.dataset) * sample_rate  # type: ignore[arg-type]  # sized
    return math.floor(expected + 1e-6)  # 49 * (1 / 49) < 1


def style_of(module: nn.Module, max_grad_norm: MaxGradNorm, clipping: str | None) -> ClippingStyle:
    """Return the style that `max_grad_norm` and `clipping` name.

    Raises
    ------
    ConfigError
        If the norms are not one a trainable parameter, or their style is not "per_layer".

    """
    if isinstance(max_grad_norm, ClippingStyle):
        return as_style(max_grad_norm, clipping)
    if not isinstance(max_grad_norm, (float, Sequence)) and hasattr(max_grad_norm, "tolist"):
        return style_of(module, max_grad_norm.tolist(), clipping)  # of NumPy or torch
    if not isinstance(max_grad_norm, Sequence):
        return as_style(float(max_grad_norm), clipping)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if clipping != "per_layer" or len(max_grad_norm) != len(names):
        raise ConfigError(
            f"max_grad_norm is a sequence of {len(max_grad_norm)}: that is for clipping='per_layer', with "
            f"one norm for each of the {len(names)} trainable parameters"
        )
    return PerLayer(dict(zip(names, max_grad_norm, strict=True)))


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module to attach to: what Opacus has wrapped is taken out of its wrapper, for good.

    Raises
    ------
    RefusedModelError
        If several processes, or copies of the module, would each clip and add noise.

    """
    _refuse_distributed(module)
    return module.to_standard_module() if isinstance(module, AbstractGradSampleModule) else module


def _refuse_distributed(module: nn.Module) -> None:
    """Raise where several processes, or copies of the module, would each clip and add noise.

    Raises
    ------
    RefusedModelError
        Saying what to give instead.

    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise RefusedModelError(
                f"torch.distributed runs with {ranks} ranks: every rank would clip and add noise on its own, "
                "and the ranks' sums would not meet. Train in one process."
            )
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(module, wrappers):
        raise RefusedModelError(
            f"{type(module).__name__} copies or synchronises the module itself: give the module inside of it"
        )


def refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    """Raise where a step is several evaluations of the loss.

    Raises
    ------
    ConfigError
        Naming the optimizer.

    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(optimizer).__name__} computes the loss several times in a step, each time on private "
            "data that the accountant would not count: use an optimizer whose step() needs no closure"
        )


def refuse_half_precision(trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise where a clipped sum is rounded before there is noise, by more than one sample may change it.

    Raises
    ------
    ConfigError
        Naming the first such parameter.

    """
    half = [name for name, p in trainable.items() if p.dtype.itemsize < 4]
    if half:
        raise ConfigError(
            f"{half[0]!r} ({len(half)} of {len(trainable)} parameters) is of half precision, in which one "
            "sample changes the clipped sum by more than the bound that noise is scaled to: keep parameters "
            "in float32, and run the model under bfloat16 autocast"
        )


def refuse_options(batch_first: bool, rand_on_empty: bool, mode: str, unknown: Mapping[str, Any]) -> None:
    """Raise for options of Opacus that are not offered here, and for what is no option.

    Raises
    ------
    ConfigError
        As said, by name.

    """
    if not batch_first:
        raise ConfigError("batch_first=False: axis 0 of every input must be the batch; transpose it")
    if rand_on_empty:
        raise ConfigError("rand_on_empty=True is not needed: an empty batch is a step of noise")
    if mode not in MODES:
        raise ConfigError(f"grad_sample_mode {mode!r}: there are {', '.join(MODES)}")
    of_adaptive = [f"{name} is {field}" for name, field in ADAPTIVE.items() if name in unknown]
    if of_adaptive:
        raise ConfigError(
            "the adaptive style has its settings in max_grad_norm=psgrad.clipping.AdaptiveQuantile(max_norm, "
            f"expected_batch_size, ...), without clipping='adaptive': {', '.join(of_adaptive)}"
        )
    if unknown:
        raise ConfigError(
            f"make_private has no option {', '.join(sorted(unknown))}. A style's settings go into the "
            "style: max_grad_norm=psgrad.clipping.AdaptiveQuantile(...)"
        )
