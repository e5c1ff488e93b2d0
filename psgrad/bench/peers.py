"""Who is compared: every way of getting each verb from x and the output's gradient of one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any, Literal

import torch
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import Tensor, nn
from torch.nn.utils._expanded_weights import conv_utils

from psgrad.bench.cases import ConvCase
from psgrad.conv import weight_grad_sq_norms, weight_grads, weighted_weight_grad
from psgrad.conv.strategies import STRATEGIES

__all__ = [
    "PEERS",
    "SUITES",
    "BenchVerb",
    "Contender",
    "Maker",
    "factors",
    "ordinary_gradient",
    "temporary_bytes",
]

BenchVerb = Literal["grads", "sq_norms", "weighted_sum"]
Contender = Callable[[Tensor, Tensor], Tensor]
"""Takes x and the output's gradient."""
Maker = Callable[[ConvCase], Contender]
"""Prepares a contender for a case; what it does here is not timed."""

MODULES: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
FUNCTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


def layer_of(case: ConvCase, like: Tensor | None = None) -> Any:
    """Return the case as a module, without bias."""
    layer = MODULES[case.rank, case.transposed](
        case.in_channels,
        case.out_channels,
        case.kernel_size,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        bias=False,
    )
    return layer if like is None else layer.to(like.device, like.dtype)


def factors(x: Tensor) -> Tensor:
    """Clipping factors `[N]` for a weighted sum: from near 0 to 1, in float32."""
    return torch.linspace(0.05, 1.0, x.shape[0], device=x.device)


def psgrad_strategy(strategy: str, case: ConvCase) -> Contender:
    """`psgrad.conv.weight_grads` by one strategy or "auto"."""
    weight_shape, geometry = case.weight_shape, case.geometry
    return lambda x, grad: weight_grads(x, grad, weight_shape, geometry, strategy)


def psgrad_norms(strategy: str, case: ConvCase) -> Contender:
    """`psgrad.conv.weight_grad_sq_norms` by one strategy or "auto"."""
    weight_shape, geometry = case.weight_shape, case.geometry
    return lambda x, grad: weight_grad_sq_norms(x, grad, weight_shape, geometry, strategy)


def psgrad_weighted(case: ConvCase) -> Contender:
    """`psgrad.conv.weighted_weight_grad`, no per-sample gradient in between."""
    weight_shape, geometry = case.weight_shape, case.geometry
    return lambda x, grad: weighted_weight_grad(x, grad, weight_shape, geometry, factors(x))


def norms_of(make: Maker, case: ConvCase) -> Contender:
    """Squared norms `[N]` of a contender's gradients, as who has gradients only must take them."""
    grads = make(case)
    return lambda x, grad: grads(x, grad).flatten(1).float().square().sum(1)


def weighted_of(make: Maker, case: ConvCase) -> Contender:
    """Weighted sum of a contender's gradients, as who has gradients only must take it."""
    grads = make(case)
    return lambda x, grad: torch.tensordot(factors(x).to(x.dtype), grads(x, grad), dims=1)


def opacus_grad_sampler(case: ConvCase) -> Contender:
    """Opacus's sampler, called as its hooks call it; for transposed convolutions its functorch fallback."""
    layers: dict[tuple[torch.device, torch.dtype], Any] = {}

    @torch.no_grad()
    def sample(x: Tensor, grad: Tensor) -> Tensor:
        kind = (x.device, x.dtype)
        if kind not in layers:
            layers[kind] = layer_of(case, x)
            if case.transposed:
                prepare_layer(layers[kind])
        layer = layers[kind]
        if case.transposed:
            return ft_compute_per_sample_gradient(layer, [x], grad)[layer.weight]
        return compute_conv_grad_sample(layer, [x], grad)[layer.weight]

    return sample


def expanded_weights(case: ConvCase) -> Contender:
    """PyTorch's ExpandedWeights: the functions its convolution's backward calls, chosen as it chooses."""
    if case.transposed:
        raise NotImplementedError("ExpandedWeights has no transposed convolutions")
    geometry = case.geometry
    padding = tuple(geometry.symmetric_padding)
    function = FUNCTIONS[case.rank]

    @torch.no_grad()
    def sample(x: Tensor, grad: Tensor) -> Tensor:
        n = x.shape[0]
        shape, stride, dilation = case.weight_shape, geometry.stride, geometry.dilation
        if n < conv_utils.THRESHOLD and case.groups == 1:
            return conv_utils.conv_group_weight_grad_sample(
                x, grad, shape, stride, padding, dilation, n, function
            )
        return conv_utils.conv_unfold_weight_grad_sample(
            x, grad, shape, list(case.kernel), stride, padding, dilation, case.groups, function
        )

    return sample


def backpack_batch_grad(case: ConvCase) -> Contender:
    """BackPACK's BatchGrad of the layer, called as its backward hook calls it."""
    from backpack.extensions.firstorder.batch_grad import (  # of the bench extra
        conv1d,
        conv2d,
        conv3d,
        conv_transpose1d,
        conv_transpose2d,
        conv_transpose3d,
    )

    extensions: dict[tuple[int, bool], Any] = {
        (1, False): conv1d.BatchGradConv1d,
        (2, False): conv2d.BatchGradConv2d,
        (3, False): conv3d.BatchGradConv3d,
        (1, True): conv_transpose1d.BatchGradConvTranspose1d,
        (2, True): conv_transpose2d.BatchGradConvTranspose2d,
        (3, True): conv_transpose3d.BatchGradConvTranspose3d,
    }
    extension = extensions[case.rank, case.transposed]()
    options = SimpleNamespace(get_subsampling=lambda: None)
    layers: dict[tuple[torch.device, torch.dtype], Any] = {}

    @torch.no_grad()
    def sample(x: Tensor, grad: Tensor) -> Tensor:
        kind = (x.device, x.dtype)
        if kind not in layers:
            layers[kind] = layer_of(case, x)
        layer = layers[kind]
        layer.input0, layer.output = x, grad  # of the output it reads the shape only
        return extension.weight(options, layer, (None,), (grad,), None)

    return sample


def torch_func(case: ConvCase) -> Contender:
    """What `torch.func.vmap(grad(..))` of the functional convolution runs for the weight.

    `vmap` of the backward operator, through PyTorch's own batch rule; `grad` would compute the
    forward convolution as well, which no other contender does.
    """

    def one_sample(x: Tensor, grad: Tensor) -> Tensor:
        return backward(case, x.unsqueeze(0), grad.unsqueeze(0))

    return torch.no_grad()(torch.func.vmap(one_sample))


def ordinary_gradient(case: ConvCase) -> Contender:
    """The floor: the layer's ordinary weight gradient `[*weight_shape]`, summed over the batch."""
    return torch.no_grad()(partial(backward, case))


def backward(case: ConvCase, x: Tensor, grad: Tensor) -> Tensor:
    """One `convolution_backward` that is asked for the weight gradient only."""
    geometry = case.geometry
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        x.new_empty(()).expand(case.weight_shape),
        None,
        geometry.stride,
        geometry.symmetric_padding,
        geometry.dilation,
        case.transposed,
        (0,) * case.rank,
        case.groups,
        (False, True, False),
    )[1]


PEERS: dict[str, Maker] = {
    "opacus": opacus_grad_sampler,
    "torch.func": torch_func,
    "ExpandedWeights": expanded_weights,
    "BackPACK": backpack_batch_grad,
}
"""Who is not psgrad: gradients. A new one is a function and a line here, and in `temporary_bytes` what it
holds beside its result, if that is much."""

SUITES: dict[BenchVerb, dict[str, Maker]] = {
    "grads": {
        **{name: partial(psgrad_strategy, name) for name in ("auto", *STRATEGIES) if name != "gram"},
        **PEERS,
    },
    "sq_norms": {
        **{name: partial(psgrad_norms, name) for name in ("auto", *STRATEGIES)},
        **{name: partial(norms_of, make) for name, make in PEERS.items()},
    },
    "weighted_sum": {
        "auto": psgrad_weighted,
        **{name: partial(weighted_of, make) for name, make in PEERS.items()},
    },
}
"""Contenders by verb and name; the order is that of the tables. "auto" is psgrad as it is called; then every
strategy, but "gram" makes no gradients, and "triton" is left out without CUDA."""


def temporary_bytes(name: str, case: ConvCase, batch_size: int, itemsize: int) -> int:
    """Estimate the temporaries of a contender that makes large ones; 0 for the others.

    Opacus and ExpandedWeights unfold the input and multiply all pairs of groups; BackPACK repeats the
    output's gradient for every input channel.
    """
    if case.transposed or name not in ("opacus", "ExpandedWeights", "BackPACK"):
        return 0
    per_group = case.in_channels // case.groups
    if name == "BackPACK":
        return itemsize * batch_size * case.out_channels * per_group * case.positions
    unfolded = itemsize * batch_size * case.in_channels * prod(case.kernel) * case.positions
    return unfolded + case.groups * case.result_bytes(batch_size, itemsize)
