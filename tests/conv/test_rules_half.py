"""The rules in half precision, where a backend leaves elements of a weight gradient as it found them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from psgrad.conv import use_rules

SHAPES = [(4, 4, 1), (32, 32, 1), (8, 8, 4)]
"""Channels in and out, groups."""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("channels", "outputs", "groups"), SHAPES)
@pytest.mark.parametrize("batched", ["x", "w", "xw"])
def test_offsets_that_meet_padding_alone_have_gradient_zero(batched, channels, outputs, groups, transposed):
    """Of a 3x3 kernel on one element all but the middle; transposed, with an output of one element."""
    convolve = F.conv_transpose2d if transposed else F.conv2d
    weight = (
        torch.ones(channels, outputs // groups, 3, 3)
        if transposed
        else torch.ones(outputs, channels // groups, 3, 3)
    )
    x, weight = torch.ones(2, channels, 1, 1, dtype=torch.bfloat16), weight.bfloat16()
    x, x_dim = (x.repeat(3, 1, 1, 1, 1), 0) if "x" in batched else (x, None)
    weight, w_dim = (weight.repeat(3, 1, 1, 1, 1), 0) if "w" in batched else (weight, None)
    dead = torch.ones(3, 3, dtype=torch.bool)
    dead[1, 1] = False

    def loss(w, x, stride):
        return convolve(x, w, stride=stride, padding=1, groups=groups).sum()

    for stride, _ in itertools.product((1, 2), range(5)):
        left = [
            torch.full((size,), torch.nan).bfloat16() for size in (weight.numel(), 3 * weight.numel(), 2**14)
        ]
        del left
        with use_rules():
            grads = vmap(grad(loss), in_dims=(w_dim, x_dim, None))(weight, x, stride)
        assert (grads[..., dead] == 0).all()
        assert (grads[..., 1, 1] == 2).all()
