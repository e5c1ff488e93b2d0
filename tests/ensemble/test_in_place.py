"""Weight gradients that are written into the stack: all kinds of layers, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psgrad.ensemble import Ensemble, eager, in_place

MEMBERS = 3

ONE_POSITION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: nn.Conv1d(4, 6, 3), (4, 3)),
    "2-D": (lambda: nn.Conv2d(4, 6, 3), (4, 3, 3)),
    "3-D": (lambda: nn.Conv3d(4, 6, 2, bias=False), (4, 2, 2, 2)),
    "padding, stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 2, 1)),
    "padding alone": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 1, 1)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (4, 1, 1)),
    "dilation": (lambda: nn.Conv2d(4, 6, 2, dilation=(2, 1)), (4, 3, 2)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 3, 3)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 1, 1)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (4, 1, 1)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 1, 1)),
}


@pytest.fixture(autouse=True)
def _every_gradient_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_LARGE", 0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights whose gradients were written, in the order of members and layers."""
    weights: list[Tensor] = []
    write = in_place._write

    def noted(how: Any, weight: Tensor, *rest: Any) -> None:
        weights.append(weight)
        write(how, weight, *rest)

    monkeypatch.setattr(in_place, "_write", noted)
    return weights


def squares(out: Tensor, target: Tensor) -> Tensor:
    return (out.flatten(1).sum(1) - target).square().mean()


def assert_as_alone(
    fn: Callable[[], nn.Module],
    shape: tuple[int, ...],
    loss: Callable[[Tensor, Tensor], Tensor] = squares,
    samples: int = 5,
) -> None:
    """Gradients of two steps are those that each member has alone, in float64."""
    ens = Ensemble.from_factory(lambda: fn().double(), range(MEMBERS), strategy="loop")
    torch.manual_seed(0)
    for _ in range(2):
        x = torch.randn(MEMBERS, samples, *shape, dtype=torch.float64)
        y = torch.randn(MEMBERS, samples, dtype=torch.float64)
        ens.zero_grad()
        ens.loss(loss, x, y, own=True).sum().backward()
        for k in range(MEMBERS):
            alone = ens.member(k)
            loss(alone(x[k]), y[k]).backward()
            for (name, p), stacked in zip(alone.named_parameters(), ens.parameters(), strict=True):
                assert (p.grad is None) == (stacked.grad is None), name
                if p.grad is not None:
                    torch.testing.assert_close(stacked.grad[k], p.grad, rtol=1e-12, atol=1e-12)


class Times(nn.Module):
    """`x @ weight` of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, 6)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.weight


class Scaled(Times):
    """A product that is scaled as it is made."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x.new_zeros(6), self.norm(x), self.weight, alpha=0.5)


LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "without bias": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6, bias=False)), (4,)),
    "tokens": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6)), (3, 4)),
    "tokens, without bias": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6, bias=False)), (3, 4)),
    "x @ weight": (Times, (4,)),
    "tokens @ weight": (Times, (3, 4)),
}


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", LINEAR)
def test_a_product_is_written(name: str, samples: int, written: list[Tensor]) -> None:
    layer, shape = LINEAR[name]
    assert_as_alone(layer, shape, samples=samples)
    assert len(written) == 2 * MEMBERS


def test_two_layers_are_written_apart_from_each_other(written: list[Tensor]) -> None:
    assert_as_alone(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (4,))
    assert len(written) == 4 * MEMBERS


class TwiceLinear(nn.Module):
    """One weight, two calls: through a transposition each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class TransposedOnce(TwiceLinear):
    """One weight, one transposition, two products."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.t()
        return torch.addmm(self.layer.bias, torch.addmm(self.layer.bias, x, weight).tanh(), weight)


class Tied(nn.Module):
    """One weight in two layers, transposed in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Linear(4, 6), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).tanh(), self.first.weight.t(), self.bias)


class BilinearForm(nn.Module):
    """A weight on the left of a product, and one on its right."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.left @ self.right)


@pytest.mark.parametrize("kind", [TwiceLinear, TransposedOnce, Tied, Scaled])
def test_a_weight_of_several_products_or_a_scaled_one_is_left_to_autograd(
    kind: type[nn.Module], written: list[Tensor]
) -> None:
    assert_as_alone(kind, (4,))
    assert not written


def test_a_product_of_two_weights_is_right() -> None:
    assert_as_alone(BilinearForm, (4,))


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", ONE_POSITION)
def test_a_convolution_with_one_position_is_written(name: str, samples: int, written: list[Tensor]) -> None:
    layer, shape = ONE_POSITION[name]
    assert_as_alone(lambda: nn.Sequential(nn.GroupNorm(1, 4), layer()), shape, samples=samples)
    assert len(written) == 2 * MEMBERS


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


class Laid(nn.Module):
    """Gives layers an input, and gets their output's gradient, in some memory layout."""

    def __init__(self, layer: nn.Module, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.scale, self.layout = layer, nn.Parameter(torch.ones(())), layout

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.layout(x * self.scale))
        out.register_hook(self.layout)
        return out.tanh()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*ONE_POSITION, "linear", "tokens"])
def test_every_memory_layout_is_written(name: str, layout: str, written: list[Tensor]) -> None:
    layer, shape = LINEAR[name] if name in LINEAR else ONE_POSITION[name]
    assert_as_alone(lambda: Laid(layer(), LAYOUTS[layout]), shape)
    assert len(written) == 2 * MEMBERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["2-D", "groups", "transposed", "linear", "tokens"])
def test_gradients_of_every_precision_are_those_of_autograd(
    name: str, dtype: torch.dtype, written: list[Tensor]
) -> None:
    layer, shape = LINEAR[name] if name in LINEAR else ONE_POSITION[name]
    ens = Ensemble.from_factory(lambda: Laid(layer(), torch.clone).to(dtype), range(MEMBERS), strategy="loop")
    x, y = torch.randn(5, *shape, dtype=dtype), torch.randn(5, dtype=dtype)
    ens.loss(squares, x, y).sum().backward()
    assert len(written) == MEMBERS
    for k in range(MEMBERS):
        alone = ens.member(k)
        squares(alone(x), y).backward()
        for p, stacked in zip(alone.parameters(), ens.parameters(), strict=True):
            assert stacked.grad.dtype == dtype
            error = float((stacked.grad[k] - p.grad).double().norm())
            assert error <= 4 * torch.finfo(dtype).eps * float(p.grad.double().norm())


def test_many_positions_are_left_to_autograd(written: list[Tensor]) -> None:
    assert_as_alone(lambda: nn.Sequential(nn.GroupNorm(1, 4), nn.Conv2d(4, 6, 3)), (4, 12, 11))
    assert not written


def test_a_first_layer_is_written_where_its_bias_is_asked_for(written: list[Tensor]) -> None:
    assert_as_alone(lambda: nn.Conv2d(4, 6, 3), (4, 3, 3))
    assert len(written) == 2 * MEMBERS


def test_where_nothing_else_is_asked_for_autograd_is(written: list[Tensor]) -> None:
    def deep() -> nn.Module:
        layers = (nn.Conv2d(4, 6, 3, bias=False), nn.Tanh(), nn.Conv2d(6, 5, 1, bias=False))
        return nn.Sequential(*layers, nn.Tanh(), nn.Conv2d(5, 2, 1, bias=False))

    assert_as_alone(deep, (4, 3, 3))
    assert not written


class Twice(nn.Module):
    """One weight, two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(self.norm(x))))


class Elsewhere(Twice):
    """A weight that is used as it is besides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x)) + self.layer.weight.square().sum()


class Hooked(Twice):
    """A weight whose gradient a hook changes."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.register_hook(lambda grad: 2 * grad)
        return self.layer(self.norm(x))


class Checkpointed(Twice):
    """A layer that runs again in the backward pass, which unpacks what it saved once."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, self.norm(x), use_reentrant=False)


class Computed(Twice):
    """A weight that is computed of a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight - self.layer.weight.mean()
        return nn.functional.conv2d(self.norm(x), weight, self.layer.bias, padding=1)


@pytest.mark.parametrize("kind", [Twice, Elsewhere, Hooked, Checkpointed, Computed])
def test_what_is_more_than_one_convolution_of_a_weight_is_left_to_autograd(
    kind: type[nn.Module], written: list[Tensor]
) -> None:
    assert_as_alone(kind, (4, 1, 1))
    assert not written


class HookedOutput(Twice):
    """An output whose gradient a hook changes: before it reaches the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.norm(x))
        out.register_hook(lambda grad: 3 * grad)
        return out.tanh()


def test_hooks_of_the_output_come_first(written: list[Tensor]) -> None:
    assert_as_alone(HookedOutput, (4, 1, 1))
    assert written


class _Stop(torch.autograd.Function):
    """Tells the layers before nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class Sometimes(nn.Module):
    """Whether a gradient reaches the layer depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.head = nn.GroupNorm(1, 4), nn.Conv2d(4, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.norm(x)).flatten(1)
        return self.head(_Stop.apply(out) if x.sum() > 0 else out)


@pytest.mark.parametrize("signs", [(1, -1, -1), (-1, 1, -1), (1, 1, 1)])
def test_a_member_without_a_gradient_has_zeros_where_others_have_one(signs: tuple[int, ...]) -> None:
    ens = Ensemble.from_factory(Sometimes, range(MEMBERS), strategy="loop")
    x = torch.rand(MEMBERS, 5, 4, 3, 3) * torch.tensor(signs).reshape(-1, 1, 1, 1, 1)
    for _ in range(2):  # the memory of the second step's gradients was the first one's
        ens.zero_grad()
        ens.loss(squares, x, torch.zeros(MEMBERS, 5), own=True).sum().backward()
        if signs == (1, 1, 1):
            assert ens.stacked.layer.weight.grad is None
            continue
        reached = ens.stacked.layer.weight.grad.flatten(1).any(1)
        assert reached.tolist() == [sign < 0 for sign in signs]


class Changes(Twice):
    """Writes to what a convolution has saved."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x).tanh()
        out = self.layer(inner)
        inner.mul_(2)
        return out


class ChangesLinear(TwiceLinear):
    """Writes to what a linear layer has saved."""

    def forward(self, x: Tensor) -> Tensor:
        inner = x.tanh() * self.layer.bias.sum()
        out = self.layer(inner)
        inner.mul_(2)
        return out


@pytest.mark.parametrize(("kind", "shape"), [(Changes, (4, 1, 1)), (ChangesLinear, (4,))])
def test_an_input_that_was_changed_in_place_is_an_error(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    ens = Ensemble.from_factory(kind, range(MEMBERS), strategy="loop")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ens.loss(squares, torch.randn(5, *shape), torch.randn(5))


class Complex(nn.Module):
    """Complex weights, whose gradients are products with conjugates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 6, dtype=torch.cfloat), nn.Conv1d(6, 5, 1, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.conv(self.linear(torch.complex(x, x * x)).unsqueeze(2)))


def test_complex_weights_are_left_to_autograd(written: list[Tensor]) -> None:
    ens = Ensemble.from_factory(Complex, range(MEMBERS), strategy="loop")
    x, y = torch.randn(5, 4), torch.randn(5)
    ens.loss(squares, x, y).sum().backward()
    for k in range(MEMBERS):
        alone = ens.member(k)
        squares(alone(x), y).backward()
        for p, stacked in zip(alone.parameters(), ens.parameters(), strict=True):
            torch.testing.assert_close(stacked.grad[k], p.grad)
    assert not written


@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 1)])
def test_of_no_sample_they_are_zero(layer: Callable[[], nn.Module], written: list[Tensor]) -> None:
    ens = Ensemble.from_factory(layer, range(MEMBERS), strategy="loop")
    x = torch.randn(0, *((4,) if isinstance(ens.stacked, nn.Linear) else (4, 1)))
    ens.loss(
        lambda out, target: (out.flatten(1).sum(1) - target).square().sum(), x, torch.randn(0)
    ).sum().backward()
    assert not ens.stacked.weight.grad.any()
    assert len(written) == MEMBERS


def test_an_input_that_wants_a_gradient_gets_it(written: list[Tensor]) -> None:
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    ens = Ensemble.from_factory(lambda: nn.Conv2d(4, 6, 3).double(), range(MEMBERS), strategy="loop")
    y = torch.randn(5, dtype=torch.float64)
    ens.loss(squares, x, y).sum().backward()
    (expected,) = torch.autograd.grad(sum(squares(ens.member(k)(x), y) for k in range(MEMBERS)), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    assert len(written) == MEMBERS


def test_nothing_of_a_step_stays(written: list[Tensor]) -> None:
    ens = Ensemble.from_factory(lambda: nn.Conv2d(4, 6, 3), range(MEMBERS), strategy="loop")
    before = eager._uses(ens.stacked.weight)
    losses = ens.loss(squares, torch.randn(5, 4, 3, 3), torch.randn(5))
    assert len(written) == MEMBERS
    written.clear()
    assert eager._uses(ens.stacked.weight) == before
    losses.sum().backward()


def test_a_pytorch_that_does_not_tell_of_hooks_is_not_relied_on(
    monkeypatch: pytest.MonkeyPatch, written: list[Tensor]
) -> None:
    monkeypatch.setattr(in_place, "_UNPACK_HOOK", "not an attribute")
    assert_as_alone(lambda: nn.Conv2d(4, 6, 3), (4, 3, 3))
    assert not written
