"""Where a rule's operators may go straight to the backend, and who still sees them where they must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from psgrad.conv import functorch, use_rules

X, W = (3, 2, 4, 6, 6), (5, 4, 3, 3)


class _Seen(TorchDispatchMode):
    """Notes the operators that reach it, which is from outside of every `torch.func` transform."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch._C._functorch.peek_interpreter_stack() is None
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Marked(Tensor):
    """A subclass of a user's own."""


@contextmanager
def _directly() -> Iterator[list[bool]]:
    """Whether the rules inside went straight to the backend, one by one."""
    answers: list[bool] = []
    asked = functorch._computes_only

    def noted(operands: tuple[Tensor, ...]) -> bool:
        answers.append(asked(operands))
        return answers[-1]

    functorch._computes_only = noted
    try:
        yield answers
    finally:
        functorch._computes_only = asked


def _losses(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda x: F.conv2d(x, w, padding=1).square().sum())(x)


def _gradients(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda w, x: F.conv2d(x, w).square().sum()), (None, 0))(w, x)


def _operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(X, generator=generator), torch.randn(W, generator=generator)


@pytest.mark.parametrize("function", [_losses, _gradients])
def test_plain_eager_calls_go_directly(function: Callable) -> None:
    x, w = _operands()
    expected = function(x, w)
    with use_rules(), _directly() as directly:
        torch.testing.assert_close(function(x, w), expected)
    assert directly
    assert all(directly)


def test_also_where_autograd_is_off_or_in_inference_mode() -> None:
    x, w = _operands()
    expected = _losses(x, w)
    for mode in (torch.no_grad, torch.inference_mode):
        with use_rules(), mode(), _directly() as directly:
            found = _losses(x, w)
        assert all(directly)
        assert found.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(found.clone(), expected)


def test_a_dispatch_mode_sees_every_operator() -> None:
    x, w = _operands()
    names = []
    for rules in (nullcontext(), use_rules()):
        with rules, _Seen() as seen:
            _gradients(x, w)
        names.append([name for name in seen.names if "convolution" in name])
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_flops_are_counted() -> None:
    x, w = _operands()
    counts = []
    for rules in (nullcontext(), use_rules("grouped")):
        with rules, FlopCounterMode(display=False) as counter:
            _gradients(x, w)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_traced_graph_has_the_convolutions() -> None:
    x, w = _operands()
    with use_rules():
        graph = make_fx(_gradients)(x, w)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("convolution" in target for target in targets) == 2
    other = torch.randn(X)
    torch.testing.assert_close(graph(other, w), _gradients(other, w))


@pytest.mark.parametrize("function", [_losses, _gradients])
def test_autocast_casts_as_without_the_rules(function: Callable) -> None:
    x, w = _operands()
    found = []
    for rules in (nullcontext(), use_rules()):
        with rules, torch.autocast("cpu", torch.bfloat16):
            found.append(function(x, w))
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2 * float(found[0].abs().max()))


def test_what_autograd_records_outside_goes_through_the_levels() -> None:
    x, w = _operands()
    gradients = []
    for rules in (nullcontext(), use_rules()):
        leaf = w.clone().requires_grad_()
        with rules, _directly() as directly:
            _losses(x, leaf).sum().backward()
        gradients.append(leaf.grad)
    assert not any(directly[:1])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_forward_mode_tangent_passes() -> None:
    x, w = _operands()
    tangents = []
    for rules in (nullcontext(), use_rules()):
        with rules, forward_ad.dual_level():
            dual = forward_ad.make_dual(w, torch.ones_like(w))
            tangents.append(forward_ad.unpack_dual(_losses(x, dual)).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(tangents[1], tangents[0])


def test_levels_outside_are_not_left_out() -> None:
    """The inner level's operands are the outer level's to work on."""
    x, w = _operands()
    weights = torch.stack([w, 2 * w])
    expected = torch.stack([_losses(x, w), _losses(x, 2 * w)])
    with use_rules(), _directly() as directly:
        torch.testing.assert_close(torch.vmap(lambda w: _losses(x, w))(weights), expected)
    assert directly.count(True) == 1  # the outermost level's


def test_what_has_leaked_from_a_transform_that_is_over() -> None:
    x, w = _operands()
    leaked: list[Tensor] = []

    def leaking(w: Tensor) -> Tensor:
        leaked.append(w)
        return w.sum()

    torch.func.grad(leaking)(w)
    with use_rules():
        found = _losses(x, leaked[0])
    torch.testing.assert_close(found, _losses(x, w))


def test_functionalized() -> None:
    x, w = _operands()
    with use_rules():
        found = torch.func.functionalize(_gradients)(x, w)
    torch.testing.assert_close(found, _gradients(x, w))


def test_a_subclass_stays_one_where_it_does_without_the_rules() -> None:
    x, w = _operands()
    marked = w.as_subclass(_Marked)
    with use_rules(), _directly() as directly:
        found = _losses(x, marked)
    assert not any(directly)
    assert type(found) is type(_losses(x, marked))


def _outputs(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda x: F.conv2d(x, w))(x)


@pytest.mark.parametrize("negative", ["x", "w"])
def test_a_negative_view_keeps_its_sign(negative: str) -> None:
    """Its memory holds the values with the other sign."""
    x, w = _operands()
    expected = -_outputs(x, w)
    with use_rules():
        found = _outputs(torch._neg_view(x), w) if negative == "x" else _outputs(x, torch._neg_view(w))
    torch.testing.assert_close(found, expected)


def test_zeros_that_have_no_memory() -> None:
    """Forward-mode AD makes such tangents, which reach the backward pass of `grad` around `jvp`."""
    x, w = _operands()

    def slope(w: Tensor) -> Tensor:
        return torch.func.jvp(lambda w: F.conv2d(x[0], w).tanh().sum(), (w,), (w,))[1]

    weights = torch.stack([w, 2 * w])
    expected = torch.stack([torch.func.grad(slope)(w) for w in weights])
    with use_rules():
        torch.testing.assert_close(torch.vmap(torch.func.grad(slope))(weights), expected)
        zeros = torch._efficientzerotensor(X)
        torch.testing.assert_close(_outputs(zeros, w), torch.zeros(3, 2, 5, 4, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_script_has_the_convolution_and_not_its_value() -> None:
    x, w = _operands()

    def function(x: Tensor, w: Tensor) -> Tensor:
        return _outputs(x, w) + x.sum()

    with use_rules():
        traced = torch.jit.trace(function, (x, w), check_trace=False)
    torch.testing.assert_close(traced(2 * x, w), function(2 * x, w))


def test_functionalized_without_a_level() -> None:
    x, w = _operands()
    inputs = [torch._to_functional_tensor(t) for t in (x, w)]
    torch._enable_functionalization(reapply_views=True)
    try:
        with use_rules():
            found = _outputs(*inputs)
    finally:
        torch._disable_functionalization()
    torch.testing.assert_close(torch._from_functional_tensor(found), _outputs(x, w))
