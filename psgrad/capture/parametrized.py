"""Layers whose weight `torch.nn.utils.parametrize` computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from psgrad.capture.computed import Computed, Made, saved_as_they_are

__all__ = ["without_parametrizations"]


def without_parametrizations(module: nn.Module) -> Computed:
    """Return a parametrized layer as it was before, with its weights computed."""
    assert is_parametrized(module)
    plain: Any = type_before_parametrizations(module)
    layer: nn.Module = plain.__new__(plain)
    layer.__dict__.update(module.__dict__)
    layer.__dict__.pop("forward", None)
    layer._modules = {}
    layer._parameters = dict(module._parameters)
    leaves: dict[nn.Parameter, Tensor] = {}
    made = {}
    parametrizations: Any = module.parametrizations
    for name, computation in parametrizations.items():
        own = {
            key: leaves.setdefault(p, p.detach().requires_grad_())
            for key, p in computation.named_parameters()
            if p.requires_grad
        }
        with torch.enable_grad(), saved_as_they_are():
            made[name] = Made(functional_call(computation, own, ()), leaves)
    return Computed(layer, made)
