"""Every module, function and method with a rule for K members, folded, against the members alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psgrad.ensemble import Ensemble
from psgrad.ensemble.functions import FUNCTION_RULES, METHOD_RULES
from psgrad.ensemble.layers import MODULE_RULES

IMAGE = (2, 6, 6)
SHAPES = {1: (4, 8), 2: (4, 8, 6), 3: (4, 8, 6, 6), 0: (4,)}


def by_rank(name: str, *args: Any, ranks: tuple[int, ...] = (1, 2, 3), **kwargs: Any) -> dict[Any, Any]:
    """Cases of `nn.NAME1d` to `nn.NAME3d`: what makes the layer, and a sample's shape."""
    kinds = {rank: getattr(nn, f"{name}{rank}d") for rank in ranks}
    return {kind: (lambda kind=kind: kind(*args, **kwargs), SHAPES[rank]) for rank, kind in kinds.items()}


ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Flatten,
)  # fmt: skip  # one a line is a page
MODULES: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{kind: (kind, SHAPES[2]) for kind in ACTIVATIONS},
    nn.Threshold: (lambda: nn.Threshold(0.1, 0.0), SHAPES[2]),
    **by_rank("Conv", 4, 6, 3),
    **by_rank("ConvTranspose", 4, 6, 3),
    **by_rank("BatchNorm", 4),
    **by_rank("InstanceNorm", 4, affine=True),
    **by_rank("Dropout", 0.5),
    **by_rank("AdaptiveAvgPool", 2),
    **by_rank("AdaptiveMaxPool", 2),
    **by_rank("AvgPool", 2),
    **by_rank("MaxPool", 2),
    **by_rank("ReflectionPad", 1, ranks=(1, 2)),
    **by_rank("ReplicationPad", 1, ranks=(1, 2)),
    **by_rank("LPPool", 2, 2, ranks=(2,)),
    **by_rank("ZeroPad", 1, ranks=(2,)),
    **by_rank("UpsamplingBilinear", scale_factor=2, ranks=(2,)),
    **by_rank("UpsamplingNearest", scale_factor=2, ranks=(2,)),
    nn.Upsample: (lambda: nn.Upsample(scale_factor=2), SHAPES[2]),
    nn.PixelShuffle: (lambda: nn.PixelShuffle(2), SHAPES[2]),
    nn.PixelUnshuffle: (lambda: nn.PixelUnshuffle(2), SHAPES[2]),
    nn.Linear: (lambda: nn.Linear(4, 3), SHAPES[0]),
    nn.Embedding: (lambda: nn.Embedding(5, 3), (4,)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), SHAPES[2]),
    nn.LayerNorm: (lambda: nn.LayerNorm(6), SHAPES[2]),
    nn.Dropout: (lambda: nn.Dropout(0.5), SHAPES[2]),
    nn.Softmax: (lambda: nn.Softmax(-1), SHAPES[2]),
    nn.LogSoftmax: (lambda: nn.LogSoftmax(-1), SHAPES[2]),
}

UNARY = (
    F.celu, F.elu, F.gelu, F.hardshrink, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu,
    F.logsigmoid, F.mish, F.relu, F.relu6, F.selu, F.silu, F.softplus, F.softsign, F.dropout,
    operator.neg, torch.abs, torch.cos, torch.exp, torch.neg, torch.relu, torch.rsqrt, torch.sigmoid,
    torch.sin, torch.sqrt, torch.square, torch.tanh, torch.relu_,
)  # fmt: skip  # one a line is a page
BINARY = (
    operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.div, torch.maximum,
    torch.minimum, torch.mul, torch.sub, operator.iadd, operator.imul, operator.isub, operator.itruediv,
)  # fmt: skip  # one a line is a page
WITH_NUMBERS: dict[Any, tuple[Any, ...]] = {
    operator.pow: (2,), torch.pow: (2,), operator.ipow: (2,), torch.clamp: (0.1, 0.9),
    torch.mean: ([2, 3],), torch.sum: ([2, 3],), torch.amax: ([2, 3],), torch.flatten: (1,),
    torch.reshape: ((3, -1),), F.adaptive_avg_pool2d: (2,), F.avg_pool2d: (2,), F.max_pool2d: (2,),
    torch.max_pool2d: (2,), F.interpolate: (None, 2),
}  # fmt: skip  # one a line is a page
FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    **{f: lambda h, f=f: f(h) for f in UNARY},
    **{f: lambda h, f=f: f(h, h + 1) for f in BINARY},
    **{f: lambda h, f=f, args=args: f(h, *args) for f, args in WITH_NUMBERS.items()},
    **{f: lambda h, f=f: f([h, h + 1], 1) for f in (torch.cat, torch.concat)},
}
METHODS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("abs", "exp", "neg", "relu", "sigmoid", "sqrt", "square", "tanh", "contiguous"), ()),
    **dict.fromkeys(("relu_", "sigmoid_", "tanh_"), ()),
    **dict.fromkeys(("add", "div", "mul", "pow", "sub", "add_", "div_", "mul_", "sub_"), (2,)),
    **dict.fromkeys(("mean", "sum", "amax"), ([2, 3],)),
    **dict.fromkeys(("view", "reshape"), (3, -1)),
    "clamp": (0.1, 0.9),
    "flatten": (1,),
}


def test_the_tables_of_cases_are_complete() -> None:
    assert set(MODULES) == set(MODULE_RULES)
    assert set(FUNCTIONS) == set(FUNCTION_RULES)
    assert set(METHODS) == set(METHOD_RULES)


class Scaled(nn.Module):
    """What every member has its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(()) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Applies(nn.Module):
    """Positive numbers of its own for every member, and then a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(F.softplus(self.conv(x)))


def check(make: Callable[[], nn.Module], x: Tensor) -> None:
    """The folded run goes by rules alone, and gives what members give alone from the same streams."""
    ensemble = Ensemble.from_factory(lambda: make().double(), range(3), strategy="folded")
    alone = [ensemble.member(k) for k in range(3)]
    expected = []
    for member, state in zip(alone, ensemble.randomness.states, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state.clone())
            expected.append(member(x))
    plan = ensemble.plan(x)
    assert plan.refusal is None
    assert not {step.strategy for step in plan.steps} & {"vmap", "loop"}, plan
    torch.testing.assert_close(ensemble(x), torch.stack(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_modules(kind: type[nn.Module]) -> None:
    make, shape = MODULES[kind]
    if kind is nn.Embedding:
        check(make, torch.randint(5, (3, *shape)))
    else:
        check(lambda: nn.Sequential(Scaled(), make()), torch.randn(3, *shape).double())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions(function: Callable[..., Tensor]) -> None:
    check(lambda: Applies(FUNCTIONS[function]), torch.randn(3, *IMAGE).double())


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    check(lambda: Applies(lambda h: getattr(h, name)(*METHODS[name])), torch.randn(3, *IMAGE).double())
