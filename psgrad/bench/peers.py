"""Who is compared: every way of getting `[N, *weight_shape]` from x and the output's gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn

from psgrad.bench.cases import ConvCase
from psgrad.conv import weight_grad_sq_norms, weight_grads

__all__ = ["SUITES", "Contender", "Maker", "ordinary_gradient"]

Contender = Callable[[Tensor, Tensor], Tensor]
"""Takes x and the output's gradient."""
Maker = Callable[[ConvCase], Contender]
"""Prepares a contender for a case; what it does here is not timed."""

MODULES: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def psgrad_strategy(strategy: str, case: ConvCase) -> Contender:
    """`psgrad.conv.weight_grads` by one strategy or "auto"."""
    weight_shape, geometry = case.weight_shape, case.geometry
    return lambda x, grad: weight_grads(x, grad, weight_shape, geometry, strategy)


def psgrad_norms(strategy: str, case: ConvCase) -> Contender:
    """`psgrad.conv.weight_grad_sq_norms` by one strategy or "auto"."""
    weight_shape, geometry = case.weight_shape, case.geometry
    return lambda x, grad: weight_grad_sq_norms(x, grad, weight_shape, geometry, strategy)


def norms_of(make: Maker, case: ConvCase) -> Contender:
    """Squared norms `[N]` of a contender's gradients, as who has gradients only must take them."""
    grads = make(case)
    return lambda x, grad: grads(x, grad).flatten(1).square().sum(1)


def opacus_grad_sampler(case: ConvCase) -> Contender:
    """Opacus's convolution sampler, called as its hooks call it."""
    layer = MODULES[case.rank](
        case.in_channels,
        case.out_channels,
        case.kernel_size,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        bias=False,
    )

    @torch.no_grad()
    def sample(x: Tensor, grad: Tensor) -> Tensor:
        return compute_conv_grad_sample(layer, [x], grad)[layer.weight]

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
        False,
        (0,) * case.rank,
        case.groups,
        (False, True, False),
    )[1]


SUITES: dict[str, dict[str, Maker]] = {
    "strategies": {
        "auto": partial(psgrad_strategy, "auto"),
        "loop": partial(psgrad_strategy, "loop"),
        "grouped": partial(psgrad_strategy, "grouped"),
        "unfold": partial(psgrad_strategy, "unfold"),
        "opacus": opacus_grad_sampler,
        "torch.func": torch_func,
    },
    "norms": {
        "auto": partial(psgrad_norms, "auto"),
        "grouped": partial(psgrad_norms, "grouped"),
        "unfold": partial(psgrad_norms, "unfold"),
        "gram": partial(psgrad_norms, "gram"),
        "opacus": partial(norms_of, opacus_grad_sampler),
        "torch.func": partial(norms_of, torch_func),
    },
}
"""Contenders by suite and name. The order is that of the tables."""
