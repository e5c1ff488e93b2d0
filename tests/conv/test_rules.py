"""Every batch rule in every case, against a loop over `B` and against PyTorch's own vmap."""

from __future__ import annotations

import re
from itertools import combinations, product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from psgrad.conv import (
    ConvGeometry,
    compute_grad_bias,
    convolution_backward_batch_rule,
    convolution_backward_input_batch_rule,
    convolution_backward_weight_batch_rule,
    convolution_batch_rule,
    cudnn_conv_per_sample_grad_rule,
    slow_fallback,
    verbs,
)
from psgrad.conv.problem import normalise
from psgrad.conv.processor import Processor
from psgrad.conv.rules import _convolution_batch_rule
from psgrad.conv.strategies import STRATEGIES
from psgrad.errors import StrategyError
from tests.conv.rule_cases import (
    BACKWARD_CASES,
    FORWARD_CASES,
    RANKS,
    Operands,
    drawn_operands,
    entries,
    operands,
    stacked,
)
from tests.machines import AMD, AMD_HALVES, INTEL, on

MASKS = tuple(product((False, True), repeat=3))
few = settings(max_examples=8, suppress_health_check=list(HealthCheck))
each_direction = pytest.mark.parametrize("transposed", [False, True], ids=("conv", "transposed"))
each_grouping = pytest.mark.parametrize("grouped", [False, True], ids=("G=1", "G>1"))
each_rank = pytest.mark.parametrize("rank", RANKS, ids=("1d", "2d", "3d"))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def loop_forward(o: Operands) -> Tensor:
    outs = []
    for x, w in zip(entries(o.x, o.x_bdim, o.batch), entries(o.w, o.w_bdim, o.batch), strict=True):
        outs.append(o.convolve(x, w))
    if o.b is not None:
        for out, b in zip(outs, entries(o.b, o.b_bdim, o.batch), strict=True):
            out += b.reshape(-1, *(1,) * (out.ndim - 2))
    return torch.stack(outs)


def loop_backward(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    gradients = []
    for g, x, w in zip(
        entries(o.g, o.g_bdim, o.batch),
        entries(o.x, o.x_bdim, o.batch),
        entries(o.w, o.w_bdim, o.batch),
        strict=True,
    ):
        # In plain memory: the operator of PyTorch 2.11 fails on some strides of one-element axes.
        x, w = (t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, w))
        grad_x, grad_w = torch.autograd.grad(o.convolve(x, w), (x, w), g)
        gradients.append((grad_x, grad_w, g.transpose(0, 1).flatten(1).sum(1)))
    grad_x, grad_w, grad_b = (torch.stack(grads) for grads in zip(*gradients, strict=True))
    return grad_x, grad_w, grad_b


def vmap_forward(o: Operands) -> Tensor:
    def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.convolution(x, w, b, *o.operator_arguments)

    return torch.vmap(plain, in_dims=(o.x_bdim, o.w_bdim, o.b_bdim))(o.x, o.w, o.b)


def vmap_backward(o: Operands) -> tuple[Tensor, ...] | None:
    def plain(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        sizes = [g.shape[1]]
        return torch.ops.aten.convolution_backward(g, x, w, sizes, *o.operator_arguments, (True,) * 3)

    try:
        return torch.vmap(plain, in_dims=(o.g_bdim, o.x_bdim, o.w_bdim))(o.g, o.x, o.w)
    except RuntimeError as error:
        # PyTorch's own rule does not survive the strides that a fold leaves on one-element axes.
        if "grad_weight" in str(error) and "contiguous" in str(error):
            return None
        raise


def test_the_tables_are_complete() -> None:
    subsets = {name: ["".join(c) for r in range(4) for c in combinations(name, r)] for name in ("gxw", "xwb")}
    assert set(BACKWARD_CASES) == set(product(subsets["gxw"], (False, True), (False, True)))
    forward = {(batched, True) for batched in subsets["xwb"]}
    forward |= {(batched, False) for batched in subsets["xwb"] if "b" not in batched}
    assert set(FORWARD_CASES) == forward


@each_rank
@each_grouping
@each_direction
@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda c: f"{c[0] or 'none'}{'+bias' * c[1]}")
@few
@given(data=st.data())
def test_forward(
    case: tuple[str, bool], transposed: bool, grouped: bool, rank: int, data: st.DataObject
) -> None:
    batched, bias = case
    o = data.draw(drawn_operands(batched, transposed, grouped, rank, bias))
    out, bdim = convolution_batch_rule(*o.forward, o.geometry)
    assert bdim == FORWARD_CASES[case]
    close(stacked(out, bdim, o.batch), loop_forward(o))
    if batched and o.is_symmetric:
        close(stacked(out, bdim, o.batch), vmap_forward(o))


@each_rank
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: f"{c[0] or 'none'}-{c[1]:d}-{c[2]:d}")
@few
@given(data=st.data())
def test_backward(case: tuple[str, bool, bool], rank: int, data: st.DataObject) -> None:
    batched, transposed, grouped = case
    o = data.draw(drawn_operands(batched, transposed, grouped, rank))
    mask = data.draw(st.sampled_from(MASKS))
    expected = loop_backward(o)
    if batched and o.is_symmetric:
        for ours, shipped in zip(expected, vmap_backward(o) or expected, strict=True):
            close(ours, shipped)

    input_bdim, weight_bdim = BACKWARD_CASES[case]
    bias_bdim = 0 if "g" in batched else None
    grad, bdim = convolution_backward_input_batch_rule(*o.backward, o.geometry)
    assert bdim == input_bdim
    close(stacked(grad, bdim, o.batch), expected[0])
    grad, bdim = convolution_backward_weight_batch_rule(*o.backward, o.geometry)
    assert bdim == weight_bdim
    close(stacked(grad, bdim, o.batch), expected[1])

    try:
        gradients = convolution_backward_batch_rule(*o.backward, o.geometry, mask)
    except RuntimeError:
        # With nothing batched the operator itself is called, which does not survive all strides.
        assert not batched
        with pytest.raises(RuntimeError, match="contiguous"):
            torch.ops.aten.convolution_backward(
                o.g, o.x, o.w, None, *o.operator_arguments, (True, True, False)
            )
        return
    for wanted, (grad, bdim), right, place in zip(
        mask, gradients, expected, (input_bdim, weight_bdim, bias_bdim), strict=True
    ):
        assert bdim == (place if wanted else None)
        assert (grad is not None) == wanted
        if grad is not None:
            close(stacked(grad, bdim, o.batch), right)

    for wanted, (grad, bdim), right in zip(
        mask, slow_fallback(*o.backward, o.geometry, mask), expected, strict=True
    ):
        assert bdim == (0 if wanted and batched and o.batch else None)
        assert (grad is not None) == wanted
        if grad is not None:
            close(stacked(grad, bdim, o.batch), right)


@each_rank
@each_grouping
@each_direction
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@few
@given(data=st.data())
def test_per_sample_path(
    strategy: str, transposed: bool, grouped: bool, rank: int, data: st.DataObject
) -> None:
    drawn = data.draw(drawn_operands("gx", transposed, grouped, rank))
    mask = data.draw(st.sampled_from(MASKS))
    g = entries(drawn.g, drawn.g_bdim, drawn.batch)
    x = entries(drawn.x, drawn.x_bdim, drawn.batch)
    at = data.draw(st.integers(0, rank + 2))
    o = Operands(
        torch.stack([t[:1] for t in g], at),
        at,
        torch.stack([t[:1] for t in x], at),
        at,
        *(drawn.w, None, None, None),
        drawn.batch,
        drawn.conv,
    )
    expected = loop_backward(o)
    if strategy != "auto" and mask[1]:
        rows = (t.movedim(at, 0).squeeze(1) for t in (o.x, o.g))
        _, _, problem = normalise(*rows, o.w.shape, o.geometry)
        refusal = STRATEGIES[strategy].refusal(problem, "grads")
        if refusal is not None:
            with pytest.raises(StrategyError, match=re.escape(refusal)):
                cudnn_conv_per_sample_grad_rule(*o.backward, o.geometry, mask, strategy)
            return
    gradients = cudnn_conv_per_sample_grad_rule(*o.backward, o.geometry, mask, strategy)
    for wanted, (grad, bdim), right in zip(mask, gradients, expected, strict=True):
        assert bdim == (0 if wanted else None)
        assert (grad is not None) == wanted
        if grad is not None:
            close(stacked(grad, bdim, o.batch), right)


@pytest.mark.parametrize("cpu", [INTEL, AMD, AMD_HALVES], ids=["Intel", "AMD", "AMD in halves"])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "by_strategy"), [(256, 1, 8, True), (64, 64, 32, False)]
)
def test_auto_leaves_the_general_rules_for_a_clearly_faster_strategy(
    channels: int, groups: int, size: int, by_strategy: bool, cpu: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, g = torch.randn(2, 32, 1, channels, size, size).unbind()
    w = torch.randn(channels, channels // groups, 3, 3)
    geometry = ConvGeometry(3, padding=1, groups=groups)
    used: list[str] = []

    def weight_grads(*arguments):
        used.append(arguments[-1])
        return verbs.weight_grads(*arguments)

    monkeypatch.setattr("psgrad.conv.rules.per_sample.weight_grads", weight_grads)
    mask = (False, True, False)
    with on(cpu):  # what is clearly faster is a matter of the machine
        _, (grad, bdim), _ = cudnn_conv_per_sample_grad_rule(g, 0, x, 0, w, None, geometry, mask)
    assert bool(used) == by_strategy
    assert bdim == 0
    _, (right, _), _ = convolution_backward_batch_rule(g, 0, x, 0, w, None, geometry, mask)
    torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("batched", "samples", "batch", "why"),
    [
        ("gx", 2, 3, "two samples in an entry"),
        ("g", 1, 3, "x shared"),
        ("x", 1, 3, "grad_output shared"),
        ("gxw", 1, 3, "a weight for every entry"),
        ("gx", 1, 0, "an empty B"),
    ],
)
def test_no_strategy_runs_outside_the_precondition(
    batched: str, samples: int, batch: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = operands(batched, False, 2, 2, samples=samples, batch=batch)
    general = convolution_backward_batch_rule(*o.backward, o.geometry, (True,) * 3)
    monkeypatch.setattr("psgrad.conv.rules.per_sample.weight_grads", None)
    per_sample = cudnn_conv_per_sample_grad_rule(*o.backward, o.geometry, (True,) * 3, "loop")
    for (ours, ours_bdim), (theirs, theirs_bdim) in zip(per_sample, general, strict=True):
        assert ours_bdim == theirs_bdim
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("recorded", ["g", "x", "tangent"])
def test_recorded_gradients_take_the_general_rules_and_stay_differentiable(recorded: str) -> None:
    o = operands("gx", False, 1, 2, samples=1)
    if recorded == "tangent":
        with torch.autograd.forward_ad.dual_level():
            tangent = torch.ones_like(o.x)
            x = torch.autograd.forward_ad.make_dual(o.x, tangent)
            (_, _), (grad, _), _ = cudnn_conv_per_sample_grad_rule(
                o.g, 0, x, 0, o.w, None, o.geometry, (False, True, False), "unfold"
            )
            derivative = torch.autograd.forward_ad.unpack_dual(grad).tangent
        expected, _ = convolution_backward_weight_batch_rule(o.g, 0, tangent, 0, o.w, None, o.geometry)
        close(derivative, expected)
        return
    {"g": o.g, "x": o.x}[recorded].requires_grad_()
    (_, _), (grad, _), _ = cudnn_conv_per_sample_grad_rule(
        *o.backward, o.geometry, (False, True, False), "loop"
    )
    assert grad.requires_grad
    with torch.no_grad():  # nobody records now
        (_, _), (grad, _), _ = cudnn_conv_per_sample_grad_rule(
            *o.backward, o.geometry, (False, True, False), "loop"
        )
    assert not grad.requires_grad


@each_direction
def test_input_gradient_with_a_batched_weight_and_groups_moves_the_group_axis_first(transposed: bool) -> None:
    """The result comes as N(GBI). Splitting it into (B, GI) at once mixes groups with entries of B."""
    o = operands("w", transposed, 2, 2, batch=3)
    grad, bdim = convolution_backward_input_batch_rule(*o.backward, o.geometry)
    right = loop_backward(o)[0]
    assert bdim == 1
    close(grad.movedim(1, 0), right)
    # N B (GI) -> N B G I -> N G B I -> N (GBI): what the operator returned
    folded = grad.unflatten(2, (2, -1)).transpose(1, 2).flatten(1, 3)
    at_once = folded.unflatten(1, (3, -1)).movedim(1, 0)
    assert not torch.allclose(at_once, right)


@pytest.mark.parametrize("batched", ["", "g"])
@pytest.mark.parametrize("mask", MASKS)
def test_bias_gradient(batched: str, mask: tuple[bool, bool, bool]) -> None:
    o = operands(batched, False, 2, 2, bdim=2)
    grad = compute_grad_bias(o.g, mask, o.g_bdim)
    if not mask[2]:
        assert grad is None
        return
    close(stacked(grad, 0 if batched else None, o.batch), loop_backward(o)[2])


def test_backend_flags_are_dropped() -> None:
    o = operands("x", False, 1, 2)
    for flags in product((False, True), repeat=4):
        out, bdim = _convolution_batch_rule(*o.forward, o.geometry, *flags)
        assert bdim == 0
        close(out, loop_forward(o))


# Empty and single axes


@each_rank
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: f"{c[0] or 'none'}-{c[1]:d}-{c[2]:d}")
@pytest.mark.parametrize(("batch", "samples"), [(0, 2), (1, 2), (0, 1), (1, 1), (2, 0), (0, 0)])
def test_empty_and_single_axes(case: tuple[str, bool, bool], rank: int, batch: int, samples: int) -> None:
    batched, transposed, grouped = case
    groups = 2 if grouped else 1
    o = operands(batched, transposed, groups, rank, batch=batch, samples=samples, bdim=1, padding=1)
    one = operands("", transposed, groups, rank, padding=1)
    shapes = [(samples, *one.x.shape[1:]), tuple(one.w.shape), (one.g.shape[1],)]
    input_bdim, weight_bdim = BACKWARD_CASES[case]
    places = (input_bdim, weight_bdim, 0 if "g" in batched else None)
    gradients = convolution_backward_batch_rule(*o.backward, o.geometry, (True,) * 3)
    for (grad, bdim), shape, place in zip(gradients, shapes, places, strict=True):
        assert bdim == place
        expected = shape if bdim is None else (*shape[:bdim], batch, *shape[bdim:])
        assert tuple(grad.shape) == expected
        if samples == 0:
            assert not grad.any()
    for grad, bdim in slow_fallback(*o.backward, o.geometry, (True,) * 3):
        assert bdim == (0 if batched else None)
        assert grad.shape[0] == batch or not batched
    if "g" not in batched:
        out, bdim = convolution_batch_rule(*o.forward, o.geometry)
        assert bdim == FORWARD_CASES[batched, False]
        shape = (samples, *one.g.shape[1:])
        assert tuple(out.shape) == (shape if bdim is None else (*shape[:bdim], batch, *shape[bdim:]))


def test_empty_batch_with_bias_keeps_the_graph() -> None:
    o = operands("xwb", False, 2, 2, bias=True, batch=0)
    leaves = (o.x.requires_grad_(), o.w.requires_grad_(), o.b.requires_grad_())
    out, bdim = convolution_batch_rule(*o.forward, o.geometry)
    assert bdim == 0
    assert out.shape == (0, *operands("", False, 2, 2).g.shape)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape


# Padding that the operator does not do


@pytest.mark.parametrize("batched", ["", "g", "x", "w", "gx", "gw", "xw", "gxw"])
def test_same_padding_with_an_even_kernel(batched: str) -> None:
    o = operands(batched, False, 2, 2, kernel=2, padding=(0, 1))
    geometry = ConvGeometry((2, 2), padding="same", groups=2)
    for (grad, bdim), right in zip(
        convolution_backward_batch_rule(*o.backward, geometry, (True,) * 3), loop_backward(o), strict=True
    ):
        close(stacked(grad, bdim, 2), right)
    out, bdim = convolution_batch_rule(*o.forward, geometry)
    close(stacked(out, bdim, 2), loop_forward(o))


# Memory
