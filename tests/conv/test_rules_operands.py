"""What the batch rules do to their operands: memory, layouts, gradients, and what does not fit."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from psgrad.conv import (
    ConvGeometry,
    compute_grad_bias,
    convolution_backward_batch_rule,
    convolution_backward_input_batch_rule,
    convolution_backward_weight_batch_rule,
    convolution_batch_rule,
    cudnn_conv_per_sample_grad_rule,
    slow_fallback,
    use_rules,
)
from psgrad.errors import ShapeError, StrategyError
from tests.conv.rule_cases import (
    BACKWARD_CASES,
    RANKS,
    operands,
    stacked,
)
from tests.conv.test_rules import close, loop_forward

MASKS = tuple(product((False, True), repeat=3))
few = settings(max_examples=8, suppress_health_check=list(HealthCheck))
each_direction = pytest.mark.parametrize("transposed", [False, True], ids=("conv", "transposed"))
each_grouping = pytest.mark.parametrize("grouped", [False, True], ids=("G=1", "G>1"))
each_rank = pytest.mark.parametrize("rank", RANKS, ids=("1d", "2d", "3d"))


class Allocations(TorchDispatchMode):
    """Bytes of new storage that operators return, and the operands of `convolution_backward`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.backward_operands: list[tuple[Tensor, Tensor]] = []
        self.seen: set[int] = set()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.backward_operands.append((args[1], args[2]))
        inputs = {t.untyped_storage()._cdata for t in tree_iter(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in inputs | self.seen:
                    self.bytes += storage.nbytes()
                    self.seen.add(storage._cdata)
                    self.kept.append(t)  # so that no storage's address comes back
        return result


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: f"{c[0] or 'none'}-{c[1]:d}-{c[2]:d}")
def test_dummies_hold_one_element(case: tuple[str, bool, bool]) -> None:
    batched, transposed, grouped = case
    o = operands(batched, transposed, 2 if grouped else 1, 2)
    with Allocations() as seen:
        convolution_backward_input_batch_rule(*o.backward, o.geometry)
    assert [x.untyped_storage().nbytes() for x, _ in seen.backward_operands] == [8]
    with Allocations() as seen:
        convolution_backward_weight_batch_rule(*o.backward, o.geometry)
    assert [w.untyped_storage().nbytes() for _, w in seen.backward_operands] == [8]


def test_dummies_hold_one_element_also_where_the_input_is_padded() -> None:
    o = operands("w", False, 1, 2, padding=(0, 1))
    with Allocations() as seen:
        convolution_backward_input_batch_rule(*o.backward, o.geometry)
    ((x, _),) = seen.backward_operands
    assert x.untyped_storage().nbytes() == 8
    assert x.shape[-2:] == (5, 5)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda c: f"{c[0] or 'none'}-{c[1]:d}-{c[2]:d}")
def test_no_rule_copies_a_weight_it_does_not_need(case: tuple[str, bool, bool]) -> None:
    batched, transposed, grouped = case
    groups = 2 if grouped else 1
    # The weight is far larger than x and grad_output.
    o = operands(batched, transposed, groups, 2, batch=3, samples=1, channels=(32, 32), kernel=3, spatial=3)
    weight, small = o.w.nbytes, 3 * (o.g.nbytes + o.x.nbytes) + 64
    with Allocations() as seen:
        grad, _ = convolution_backward_weight_batch_rule(*o.backward, o.geometry)
    # The gradient itself, once more where the groups are moved back; never the weight.
    reordered = grouped and ("g" in batched) != ("x" in batched) and transposed == ("x" in batched)
    assert seen.bytes <= grad.nbytes * (1 + reordered) + small

    with Allocations() as seen:
        convolution_backward_input_batch_rule(*o.backward, o.geometry)
    # A fold that puts B elsewhere than in front must copy the weight, once.
    folded = "w" in batched and "g" not in batched and (not transposed or grouped)
    assert seen.bytes <= weight * folded + 3 * small
    if "g" in batched:
        return
    with Allocations() as seen:
        convolution_batch_rule(*o.forward, o.geometry)
    folded = batched == "w" and (transposed or grouped)
    assert seen.bytes <= weight * folded + 3 * small


# Layouts and autograd


@pytest.mark.parametrize("batched", ["g", "x", "w", "gx", "gw", "xw", "gxw"])
@pytest.mark.parametrize("wanted", ["".join(c) for r in (1, 2, 3) for c in combinations("gxw", r)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_backward_rule_is_differentiable_in_whatever_requires_grad(
    batched: str, wanted: str, groups: int
) -> None:
    o = operands(batched, False, groups, 2, samples=1)
    leaves = [t.requires_grad_() for name, t in (("g", o.g), ("x", o.x), ("w", o.w)) if name in wanted]
    ours = [
        stacked(grad, bdim, o.batch)
        for grad, bdim in convolution_backward_batch_rule(*o.backward, o.geometry, (True,) * 3)
    ]
    slow = [
        stacked(grad, bdim, o.batch) for grad, bdim in slow_fallback(*o.backward, o.geometry, (True,) * 3)
    ]
    weights = [torch.randn_like(grad) for grad in ours]

    def second(gradients: list[Tensor]) -> tuple[Tensor, ...]:
        loss = sum((grad.square() * c).sum() for grad, c in zip(gradients, weights, strict=True))
        return torch.autograd.grad(loss, leaves)

    for actual, expected in zip(second(ours), second(slow), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("batched", ["x", "w", "xw"])
@pytest.mark.parametrize("bdim", range(5))
def test_channels_last_at_every_bdim(batched: str, bdim: int) -> None:
    o = operands(batched, False, 2, 2, samples=3)

    def channels_last(t: Tensor, is_batched: bool) -> Tensor:
        folded = t.flatten(0, 1) if is_batched else t
        folded = folded.contiguous(memory_format=torch.channels_last)
        return folded.unflatten(0, t.shape[:2]).movedim(0, bdim) if is_batched else folded

    x, w = channels_last(o.x, "x" in batched), channels_last(o.w, "w" in batched)
    places = [bdim if name in batched else None for name in "xw"]
    out, out_bdim = convolution_batch_rule(x, places[0], w, places[1], None, None, o.geometry)
    close(stacked(out, out_bdim, o.batch), loop_forward(o))


def test_an_expanded_batch_axis() -> None:
    o = operands("xw", False, 2, 2)
    x, w = (t[:1].expand(4, *t.shape[1:]) for t in (o.x, o.w))
    out, bdim = convolution_batch_rule(x, 0, w, 0, None, None, o.geometry)
    close(out.movedim(bdim, 0), loop_forward(o)[:1].expand(4, -1, -1, -1, -1))


def test_a_fold_that_reads_as_channels_last() -> None:
    """x is [N=1, B, C, L=1] with the channels innermost; folded N(BGI) its strides are 2, 1, 2."""
    x = torch.empty_strided((1, 2, 2, 1), (4, 1, 2, 2), dtype=torch.float64).normal_()
    g, w = torch.randn(1, 4, 2, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    geometry = ConvGeometry(transposed=True, groups=2)
    grad, bdim = convolution_backward_weight_batch_rule(g, None, x, 1, w, None, geometry)
    (_, _), (right, _), _ = slow_fallback(g, None, x, 1, w, None, geometry, (False, True, False))
    close(stacked(grad, bdim, 2), right)


# Bad input

X, W, G = torch.zeros(3, 2, 4, 5, 5), torch.zeros(6, 2, 3, 3), torch.zeros(3, 2, 6, 3, 3)
PAIR = ConvGeometry(groups=2)


@pytest.mark.parametrize(
    ("x", "xbdim", "w", "wbdim", "geometry", "message"),
    [
        (X, 5, W, None, PAIR, r"bdim 5 of x .*\(3, 2, 4, 5, 5\)"),
        (X, -6, W, None, PAIR, r"bdim -6 of x"),
        (X, 1.0, W, None, PAIR, r"bdim 1\.0 of x is neither an int nor None.*\(3, 2, 4, 5, 5\)"),
        (X, "0", W, None, PAIR, r"bdim '0' of x is neither"),
        (X.double(), 0, W, None, PAIR, r"x is torch.float64, weight is torch.float32.*\(3, 2, 4, 5, 5\)"),
        (X, 0, W, 4, PAIR, r"bdim 4 of weight .*\(6, 2, 3, 3\)"),
        (X, None, W, None, PAIR, r"spatial axes .*\(3, 2, 4, 5, 5\)"),
        (X, 0, W[0], None, PAIR, r"spatial axes .*\(2, 3, 3\)"),
        (X, 0, W.expand(4, *W.shape), 0, PAIR, r"different lengths.*\(4, 6, 2, 3, 3\)"),
        (X, 0, W, None, ConvGeometry(stride=(1, 1, 1), groups=2), r"\(3, 2, 4, 5, 5\)"),
        (X, 0, W, None, ConvGeometry((2, 2), groups=2), r"kernel .*\(6, 2, 3, 3\)"),
        (X, 0, W, None, ConvGeometry(), r"groups=1.*\(3, 2, 4, 5, 5\)"),
        (X, 0, W, None, ConvGeometry(groups=4), r"groups=4"),
        (X[..., :2], 0, W, None, PAIR, r"smaller than the kernel.*\(3, 2, 4, 5, 2\)"),
    ],
)
def test_operands_that_do_not_fit(x, xbdim, w, wbdim, geometry, message) -> None:
    with pytest.raises(ShapeError, match=message):
        convolution_batch_rule(x, xbdim, w, wbdim, None, None, geometry)
    for rule in (convolution_backward_input_batch_rule, convolution_backward_weight_batch_rule):
        with pytest.raises(ValueError, match=message):
            rule(G, 0, x, xbdim, w, wbdim, geometry)


def test_more_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"6 elements.*bias \(5,\)"):
        convolution_batch_rule(X, 0, W, None, torch.zeros(5), None, PAIR)
    with pytest.raises(ShapeError, match=r"grad_output must be \(2, 6, 3, 3\)"):
        convolution_backward_batch_rule(G[..., :2], 0, X, 0, W, None, PAIR, (True,) * 3)
    with pytest.raises(ShapeError, match="three entries"):
        convolution_backward_batch_rule(G, 0, X, 0, W, None, PAIR, (True, True))
    for mask in ("abc", True):
        with pytest.raises(ShapeError, match=f"three entries.* {mask!r}"):
            convolution_backward_batch_rule(G, 0, X, 0, W, None, PAIR, mask)
    with pytest.raises(ShapeError, match=r"grad_output is torch.float64"):
        convolution_backward_weight_batch_rule(G.double(), 0, X, 0, W, None, PAIR)
    with pytest.raises(ShapeError, match=r"bdim 1\.0 of grad_output \(3, 2, 6, 3, 3\)"):
        compute_grad_bias(G, (True,) * 3, 1.0)
    with pytest.raises(ShapeError, match="out of range"):
        compute_grad_bias(G, (True,) * 3, 5)
    with pytest.raises(ShapeError, match=r"\(3, 6\) with bdim 0"):
        compute_grad_bias(torch.zeros(3, 6), (True,) * 3, 0)
    with pytest.raises(ShapeError, match="three entries"):
        compute_grad_bias(G, (False, True), 0)
    with pytest.raises(StrategyError, match="no strategy 'fastest': there are auto, measure, loop"):
        cudnn_conv_per_sample_grad_rule(G, 0, X, 0, W, None, PAIR, (True,) * 3, "fastest")
    with pytest.raises(StrategyError, match="no strategy"):  # also where it would not be used
        cudnn_conv_per_sample_grad_rule(G, 0, X, 0, W, None, PAIR, (True, False, False), "fastest")


# The bias: added by the operator, in place, or out of place where somebody records


@pytest.mark.parametrize("batched", ["wb", "xwb", "xb"])
@each_direction
def test_a_bias_makes_no_second_output(batched: str, transposed: bool) -> None:
    o = operands(batched, transposed, 1, 2, bias=True, batch=3)
    x, x_bdim, w, w_bdim, b, _ = o.forward
    kept = [t.clone() for t in (x, w, b)]
    with Allocations() as bare:
        convolution_batch_rule(x, x_bdim, w, w_bdim, None, None, o.geometry)
    with Allocations() as biased:
        out, bdim = convolution_batch_rule(*o.forward, o.geometry)
    assert biased.bytes - bare.bytes < out.numel() * out.element_size()
    close(stacked(out, bdim, 3), loop_forward(o))
    assert all(torch.equal(t, before) for t, before in zip((x, w, b), kept, strict=True))


@pytest.mark.parametrize("batched", ["b", "xb", "wb", "xw", "xwb"])
@pytest.mark.parametrize("recorded", ["grad", "requires_grad of the bias", "tangent"])
@pytest.mark.parametrize("groups", [1, 2])
@each_direction
def test_a_recorded_bias_keeps_its_derivatives(
    batched: str, recorded: str, groups: int, transposed: bool
) -> None:
    """Writing over an output that is recorded would lose or falsify them."""
    o = operands(batched, transposed, groups, 2, bias=True, batch=3)
    x, x_bdim, w, w_bdim, b, b_bdim = o.forward

    def total(bias: Tensor) -> Tensor:
        out, bdim = convolution_batch_rule(x, x_bdim, w, w_bdim, bias, b_bdim, o.geometry)
        return stacked(out, bdim, 3).pow(2).sum()

    out, bdim = convolution_batch_rule(*o.forward, o.geometry)
    over = 2 * stacked(out, bdim, 3).flatten(3).sum((1, 3))  # of every entry and channel
    expected = over.sum(0) if b_bdim is None else over.movedim(0, b_bdim)
    if recorded == "grad":
        close(torch.func.grad(total)(b), expected)
    elif recorded == "tangent":
        close(torch.func.jvp(total, (b,), (torch.ones_like(b),))[1], expected.sum())
    else:
        leaf = b.clone().requires_grad_()
        close(torch.autograd.grad(total(leaf), leaf)[0], expected)


def test_a_bias_that_an_outer_level_batches_is_not_added_in_place() -> None:
    """The output is not batched there: it has no room for the outer level's entries."""
    x, w = torch.randn(2, 3, 4, 6, 6).double(), torch.randn(5, 4, 3, 3).double()
    b = torch.randn(7, 2, 5).double()
    inner = torch.vmap(lambda x, b: torch.conv2d(x, w, b))
    with use_rules():
        got = torch.vmap(inner, in_dims=(None, 0))(x, b)
    close(got, torch.conv2d(x.flatten(0, 1), w).unflatten(0, (2, 3)) + b[:, :, None, :, None, None])


def test_sums_of_types_are_promoted_not_written_over() -> None:
    o = operands("xb", False, 1, 2, bias=True, batch=3)
    x, x_bdim, w, w_bdim, b, b_bdim = o.forward
    out, bdim = convolution_batch_rule(x.float(), x_bdim, w.float(), w_bdim, b, b_bdim, o.geometry)
    assert out.dtype == torch.float64
    assert torch.allclose(stacked(out, bdim, 3), loop_forward(o), atol=1e-4)
