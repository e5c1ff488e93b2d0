"""`torch.vmap` and `torch.func` on the rules of psgrad: same numbers, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from psgrad.conv import install_rules, use_rules
from psgrad.conv.strategies import STRATEGIES
from psgrad.errors import ShapeError, StrategyError
from tests.conv.functorch_models import (
    ALL,
    Params,
    close,
    looped,
    loss_of,
    model,
    parameters,
    samples,
)

# Per-sample gradients


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("strategy", ALL)
def test_per_sample_gradients(strategy: str, rank: int, used: list[str]) -> None:
    net, (x, y) = model(rank), samples(rank)
    with use_rules(strategy):
        grads = vmap(grad(loss_of(net)), (None, 0, 0))(parameters(net), x, y)
    close(grads, looped(net, x, y))
    assert used == [strategy] * 3


@pytest.mark.parametrize("in_dim", [1, -1, 2])
def test_the_vmapped_axis_may_be_anywhere(in_dim: int) -> None:
    net, (x, y) = model(), samples()
    with use_rules("unfold"):
        grads = vmap(grad(loss_of(net)), (None, in_dim, 0))(parameters(net), x.movedim(0, in_dim), y)
    close(grads, looped(net, x, y))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_chunk_size(chunk_size: int) -> None:
    net, (x, y) = model(), samples(count=5)
    with use_rules("loop"):
        grads = vmap(grad(loss_of(net)), (None, 0, 0), chunk_size=chunk_size)(parameters(net), x, y)
    close(grads, looped(net, x, y))


def test_single_and_empty_batches() -> None:
    net, (x, y) = model(), samples()
    per_sample_grads = vmap(grad(loss_of(net)), (None, 0, 0))
    for strategy in ALL:
        with use_rules(strategy):
            close(per_sample_grads(parameters(net), x[:1], y[:1]), looped(net, x[:1], y[:1]))
    weight = torch.randn(4, 2, 3, 3)
    with use_rules("grouped"):  # which refuses an empty batch, and is not asked
        both = vmap(F.conv2d)(torch.zeros(0, 1, 2, 4, 4), weight.expand(0, *weight.shape))
        grads = vmap(grad(lambda w, x: F.conv2d(x, w).sum()), (None, 0))(weight, torch.zeros(0, 1, 2, 4, 4))
    assert both.shape == (0, 1, 4, 2, 2)
    assert grads.shape == (0, 4, 2, 3, 3)


def test_an_input_without_channels() -> None:
    """PyTorch's output has no channels then, whatever the weight has."""
    per_sample_grads = vmap(grad(lambda w, x: F.conv2d(x, w).sum()), (None, 0))
    for strategy in ALL:
        with use_rules(strategy):
            grads = per_sample_grads(torch.zeros(4, 0, 3, 3), torch.zeros(5, 1, 0, 4, 4))
        assert grads.shape == (5, 4, 0, 3, 3)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_randomness(randomness: str) -> None:
    net, (x, y) = model(dropout=0.5), samples()
    per_sample_grads = vmap(grad(loss_of(net)), (None, 0, 0), randomness=randomness)
    torch.manual_seed(3)
    shipped = per_sample_grads(parameters(net), x, y)
    torch.manual_seed(3)
    with use_rules():
        close(per_sample_grads(parameters(net), x, y), shipped)


def test_randomness_error_is_still_one() -> None:
    net, (x, y) = model(dropout=0.5), samples()
    with use_rules(), pytest.raises(RuntimeError, match="randomness"):
        vmap(grad(loss_of(net)), (None, 0, 0))(parameters(net), x, y)


# Ensembles and nested levels


def members() -> tuple[list[nn.Module], Params]:
    nets = [model(seed=seed) for seed in range(2)]
    stacked, _ = stack_module_state(nets)
    return nets, {name: p.detach() for name, p in stacked.items()}


def test_ensemble_of_models_with_data_of_their_own(used: list[str]) -> None:
    nets, stacked = members()
    x, y = samples(count=4)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(nets[0], params, (x,)), y)

    with use_rules("loop"):
        grads = vmap(grad(loss))(stacked, x.unflatten(0, (2, 2)), y.unflatten(0, (2, 2)))
        shared = vmap(grad(loss), (0, None, None))(stacked, x, y)
    for k, net in enumerate(nets):
        own = slice(2 * k, 2 * k + 2)
        right = looped(net, x[own], y[own])
        close({n: g[k] for n, g in grads.items()}, {n: g.mean(0) for n, g in right.items()})
        close({n: g[k] for n, g in shared.items()}, {n: g.mean(0) for n, g in looped(net, x, y).items()})
    assert used == []


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("models_outside", [True, False])
def test_nested_vmap(models_outside: bool, strategy: str, used: list[str]) -> None:
    nets, stacked = members()
    x, y = samples()
    over_samples, over_models = (None, 0, 0), (0, None, None)
    inner, outer = (over_samples, over_models) if models_outside else (over_models, over_samples)
    with use_rules(strategy):
        grads = vmap(vmap(grad(loss_of(nets[0])), inner), outer)(stacked, x, y)
    for k, net in enumerate(nets):
        mine = {name: g.select(0 if models_outside else 1, k) for name, g in grads.items()}
        close(mine, looped(net, x, y))
    # The inner level's tensors are wrapped; at the outer level its dummy weight has no B, and the
    # layers whose input differs there are a per-sample problem again.
    assert used == [strategy] * (2 if models_outside else 3)


# Other transforms


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians(jacobian: Callable) -> None:
    net, (x, _) = model(), samples(count=2)

    def outputs(params: Params, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,))

    plain = jacobian(outputs, argnums=(0, 1))(parameters(net), x)
    per_sample_plain = vmap(jacobian(outputs), (None, 0))(parameters(net), x[:, None])
    with use_rules("loop"):
        close(jacobian(outputs, argnums=(0, 1))(parameters(net), x), plain)
        close(vmap(jacobian(outputs), (None, 0))(parameters(net), x[:, None]), per_sample_plain)


def test_hessian_and_hessian_vector_products() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 2, 3, 3).double(), torch.randn(2, 1, 2, 2).double()

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x[None], w, groups=2).tanh().square().sum()

    def product(w: Tensor, x: Tensor) -> Tensor:
        return jvp(grad(lambda w: loss(w, x)), (w,), (torch.ones_like(w),))[1]

    right = torch.stack([torch.autograd.functional.hessian(lambda w, t=t: loss(w, t), w) for t in x])
    with use_rules("unfold"):
        close(vmap(hessian(loss), (None, 0))(w, x), right)
        close(vmap(jacrev(jacrev(loss)), (None, 0))(w, x), right)
        close(vmap(product, (None, 0))(w, x), right.flatten(5).sum(-1))


def test_double_backward_through_per_sample_gradients(used: list[str]) -> None:
    net, (x, y) = model(), samples()
    names = [name for name, _ in net.named_parameters()]

    def penalty() -> tuple[Tensor, ...]:
        grads = vmap(grad(loss_of(net)), (None, 0, 0))(dict(net.named_parameters()), x, y)
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
        return torch.autograd.grad(norms.sum(), [net.get_parameter(name) for name in names])

    shipped = penalty()
    with use_rules("loop"):
        close(penalty(), shipped)
    assert used == []  # a strategy leaves no graph
    with use_rules("loop"), torch.no_grad():
        vmap(grad(loss_of(net)), (None, 0, 0))(dict(net.named_parameters()), x, y)
    assert used == ["loop"] * 3


def test_grad_outside_vmap(used: list[str]) -> None:
    net, (x, y) = model(), samples()

    def summed(params: Params) -> Tensor:
        grads = vmap(grad(loss_of(net)), (None, 0, 0))(params, x, y)
        return sum(g.pow(3).sum() for g in grads.values())

    shipped = grad(summed)(parameters(net))
    with use_rules("loop"):
        close(grad(summed)(parameters(net)), shipped)
    assert used == []


# What PyTorch's own rules survive: every in_dims, odd strides, expanded, unbatched and odd arguments

CALLS = [
    ("conv1d", (2, 4, 7), (6, 2, 3), {"groups": 2, "stride": 2, "padding": 1}),
    ("conv1d", (4, 7), (6, 4, 2), {"padding": "same"}),
    ("conv2d", (2, 4, 5, 5), (6, 4, 3, 3), {}),
    ("conv2d", (2, 4, 5, 5), (6, 2, 3, 2), {"groups": 2, "padding": "same", "dilation": 2}),
    ("conv2d", (4, 5, 5), (4, 1, 3, 3), {"groups": 4, "padding": "valid"}),
    ("conv2d", (2, 4, 6, 5), (6, 4, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ("conv2d", (0, 4, 5, 5), (6, 4, 3, 3), {}),
    ("conv3d", (2, 4, 3, 4, 3), (4, 2, 2, 2, 2), {"groups": 2}),
    ("conv_transpose1d", (2, 4, 5), (4, 3, 3), {"groups": 2, "stride": 2, "output_padding": 1}),
    ("conv_transpose2d", (2, 4, 4, 4), (4, 3, 3, 2), {"padding": 1, "dilation": 2}),
    ("conv_transpose2d", (4, 4, 4), (4, 3, 2, 2), {"groups": 2}),
    ("conv_transpose3d", (1, 4, 2, 3, 2), (4, 2, 2, 2, 2), {"stride": 2}),
]


@pytest.mark.parametrize(("name", "x_shape", "w_shape", "arguments"), CALLS)
def test_functions_in_every_in_dims(name: str, x_shape: tuple, w_shape: tuple, arguments: dict) -> None:
    function = getattr(F, name)
    groups = arguments.get("groups", 1)
    channels = w_shape[1] * groups if "transpose" in name else w_shape[0]
    shapes = (x_shape, w_shape, (channels,))
    torch.manual_seed(0)
    for in_dims in product((None, 0, -1), repeat=3):
        if in_dims == (None, None, None):
            continue
        operands = []
        for shape, in_dim in zip(shapes, in_dims, strict=True):
            t = torch.randn((*shape, 2), dtype=torch.float64)  # B last in memory: odd strides
            operands.append(t[..., 0] if in_dim is None else t.movedim(-1, in_dim))
        entries = [
            [
                t if in_dim is None else t.select(in_dim, b)
                for t, in_dim in zip(operands, in_dims, strict=True)
            ]
            for b in range(2)
        ]
        right = torch.stack([function(*entry, **arguments) for entry in entries])
        with use_rules():
            close(vmap(lambda x, w, b: function(x, w, b, **arguments), in_dims)(*operands), right)


@pytest.mark.parametrize("requires_grad", list(product((False, True), repeat=3))[1:])
def test_ordinary_autograd_outside_vmap(requires_grad: tuple[bool, bool, bool]) -> None:
    shapes = ((2, 1, 4, 5, 5), (6, 2, 3, 3), (2, 6))
    torch.manual_seed(0)
    operands = [
        torch.randn(shape).double().requires_grad_(r) for shape, r in zip(shapes, requires_grad, strict=True)
    ]
    leaves = [t for t in operands if t.requires_grad]

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.tanh().sum(), leaves)

    x, w, b = operands
    right = gradients(torch.stack([F.conv2d(x[k], w, b[k], groups=2) for k in range(2)]))
    with use_rules():
        close(gradients(vmap(lambda x, b: F.conv2d(x, w, b, groups=2))(x, b)), right)


def test_operator_with_flags() -> None:
    x, w = torch.randn(2, 1, 4, 5, 5), torch.randn(6, 4, 3, 3)
    arguments = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, True, True)
    with use_rules():
        out = vmap(lambda x: torch.ops.aten._convolution(x, w, None, *arguments))(x)
    close(out, F.conv2d(x.flatten(0, 1), w).unflatten(0, (2, 1)))


def test_tensors_batched_at_an_outer_level_only() -> None:
    x, w = torch.randn(2, 1, 4, 5, 5).double(), torch.randn(6, 4, 3, 3).double()
    right = F.conv2d(x.flatten(0, 1), w).unflatten(0, (2, 1))[:, None] + torch.zeros(3, 1, 1, 1, 1)
    with use_rules():
        out = vmap(lambda x: vmap(lambda a: F.conv2d(x, w) + a)(torch.zeros(3).double()))(x)
        input_grads = vmap(
            lambda x: vmap(lambda a: (*grad(lambda x, w: F.conv2d(x, w).sum(), (0, 1))(x, w), a))(
                torch.zeros(3)
            )
        )(x)
    close(out, right)
    close(input_grads[1][1, 2], torch.autograd.functional.jacobian(lambda w: F.conv2d(x[1], w).sum(), w))


def test_a_bias_of_another_length_is_an_error_not_a_broadcast() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(3, 6, 4, 3, 3)
    with use_rules(), pytest.raises(ShapeError, match=r"bias \(1,\).*6 channels"):
        vmap(lambda w: F.conv2d(x, w, torch.zeros(1)))(w)


# Strategies


class Refusing(type(STRATEGIES["loop"])):
    """Serves nothing."""

    name = "refusing"

    def refusal(self, problem: object, verb: object) -> str | None:
        return "it is Sunday"


def test_auto_passes_over_a_strategy_that_refuses_and_a_named_one_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(STRATEGIES, "refusing", Refusing())
    net, (x, y) = model(), samples()
    per_sample_grads = vmap(grad(loss_of(net)), (None, 0, 0))
    with use_rules("auto"):
        close(per_sample_grads(parameters(net), x, y), looped(net, x, y))
    with pytest.raises(StrategyError, match=r"'refusing' refuses .* it is Sunday"), use_rules("refusing"):
        per_sample_grads(parameters(net), x, y)


@pytest.mark.parametrize("enter", [use_rules, install_rules])
def test_unknown_strategy(enter: Callable) -> None:
    with pytest.raises(ValueError, match="no strategy 'fastest': there are auto, measure, loop"):
        enter("fastest").__enter__()
