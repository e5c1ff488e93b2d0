"""psgrad inside of Opacus, against the loop over samples."""

import copy

import pytest
import torch
from opacus.grad_sample import (
    GradSampleHooksFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import (
    DPLossFastGradientClipping,
)
from torch import nn

from psgrad.conv import weighted_weight_grad as weighted
from psgrad.errors import ShapeError
from psgrad.interop import opacus
from psgrad.layers import conv
from tests.interop.opacus_cases import (
    CONVOLUTIONS,
    LAYOUTS,
    RowLosses,
    case,
    clipped_one_by_one,
    ghost,
    opacus_grads,
    small,
)
from tests.model_oracle import grads_one_by_one, squared_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.usefixtures("tables_as_they_were"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_hooks_give_the_loop_s_gradients(name, layout):
    model, x = case(name, layout)
    with opacus.use():
        got = opacus_grads(model, x)
    torch.testing.assert_close(got, grads_one_by_one(model, squared_loss, (x,)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_ghost_gives_the_loop_s_norms_and_clipped_sum(name, layout):
    model, x = case(name, layout)
    norms, _ = clipped_one_by_one(model, x, 1.0)
    max_grad_norm = float(norms.median())
    expected = clipped_one_by_one(model, x, max_grad_norm)
    with opacus.use():
        got = ghost(model, x, max_grad_norm)
    assert 0 < (norms > max_grad_norm).sum() < len(x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "layout", "wrong_by"), [("2d, circular", "contiguous", 0.1), ("2d, patches", "permuted", 1.0)]
)
def test_psgrad_is_right_where_opacus_alone_is_wrong(name, layout, wrong_by):
    model, x = case(name, layout)
    expected = grads_one_by_one(model, squared_loss, (x,))["weight"]

    def error():
        return ((opacus_grads(model, x)["weight"] - expected).norm() / expected.norm()).item()

    assert error() > wrong_by
    with opacus.use():
        assert error() < 1e-12
    assert error() > wrong_by


@pytest.mark.parametrize("kind", [GradSampleModuleFastGradientClipping, GradSampleHooksFastGradientClipping])
@pytest.mark.parametrize(
    "layers", [opacus.CONVOLUTIONS, opacus.EVERY_LAYER], ids=["convolutions", "every layer"]
)
@pytest.mark.parametrize("ghost_clipping", [True, False])
def test_ghost_in_a_model_of_several_layers(kind, layers, ghost_clipping):
    model, x = small()
    norms, _ = clipped_one_by_one(model, x, 1.0)
    max_grad_norm = float(norms.median())
    with opacus.use(layers):
        got = ghost(model, x, max_grad_norm, ghost_clipping, kind)
    torch.testing.assert_close(got, clipped_one_by_one(model, x, max_grad_norm))


@pytest.mark.parametrize(("channels", "kept"), [(4, True), (64, False)])
def test_clipped_sums_from_written_out_gradients_and_from_a_weighted_one(channels, kept, monkeypatch):
    sums = []
    monkeypatch.setattr(conv, "weighted_weight_grad", lambda *a, **k: sums.append(1) or weighted(*a, **k))
    model = nn.Conv2d(channels, channels, 3, bias=False).double()
    x = torch.randn(5, channels, 4, 4, dtype=torch.float64)
    with opacus.use():
        got = ghost(model, x, 1.0)
    torch.testing.assert_close(got, clipped_one_by_one(model, x, 1.0))
    assert len(sums) == (0 if kept else 1)


def test_with_every_layer_there_is_one_backward_pass():
    model, x = small()
    passes = []
    model.head.register_full_backward_hook(lambda *_: passes.append(1))
    with opacus.use(opacus.EVERY_LAYER):
        ghost(model, x, 1.0)
    once = len(passes)
    with opacus.use():
        ghost(model, x, 1.0)
    assert (once, len(passes) - once) == (1, 2)


def test_what_psgrad_does_not_compute_still_gets_its_gradient():
    """A leaf outside of the wrapped model, and a parameter whose gradient somebody listens to."""
    model, x = small()
    heard = []
    listened = copy.deepcopy(model)
    listened.first.weight.register_hook(lambda grad: heard.append(grad))  # gone in the copy of ghost()
    x = x.requires_grad_()
    engine = GradSampleModuleFastGradientClipping(listened, max_grad_norm=0.5)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(listened.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=6,
    )
    results = []
    for with_psgrad in (False, True):
        listened.zero_grad()
        x.grad = None
        if with_psgrad:
            opacus.install()
        # padding that Opacus alone has wrong
        listened.first.padding_mode = "zeros"
        DPLossFastGradientClipping(engine, optimizer, RowLosses())(engine(x)).backward()
        results.append([x.grad, heard[-1], *(p.grad.clone() for p in listened.parameters())])
        assert len(heard) == 2 * len(results)
    opacus.uninstall()
    torch.testing.assert_close(*results)


def test_hooks_mode_trains_with_opacus_s_optimizer():
    model, x = small()
    model.first.padding_mode = "zeros"
    steps = []
    for layers in ((), opacus.CONVOLUTIONS):
        trained = copy.deepcopy(model)
        engine = GradSampleModule(trained)
        optimizer = DPOptimizer(
            torch.optim.SGD(trained.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            expected_batch_size=len(x),
        )
        with opacus.use(layers):
            for _ in range(3):
                optimizer.zero_grad()
                squared_loss(engine, x).backward()
                optimizer.step()
        steps.append(dict(trained.named_parameters()))
    torch.testing.assert_close(*steps)


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).tanh())

    model, x = Twice().double(), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    expected = grads_one_by_one(model, squared_loss, (x,))
    with opacus.use():
        torch.testing.assert_close(opacus_grads(model, x), expected)
        torch.testing.assert_close(
            ghost(model, x, 1.0, ghost_clipping=False), clipped_one_by_one(model, x, 1.0)
        )
        with pytest.raises(NotImplementedError, match="tying"):  # as for Opacus's own linear layers
            ghost(model, x, 1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_first_false_is_no_matter_to_a_convolution(reduction):
    model, x = case("2d, strided groups")
    expected = grads_one_by_one(model, squared_loss, (x,))

    def loss(model, x):
        return squared_loss(model, x) * (len(x) if reduction == "sum" else 1)

    with opacus.use():
        got = opacus_grads(model, x, loss, batch_first=False, loss_reduction=reduction)
    torch.testing.assert_close(got, expected)


def test_an_empty_batch():
    model, x = small(samples=0)
    with opacus.use():
        got = opacus_grads(model, x, lambda m, x: m(x).sum(), loss_reduction="sum")
    assert {name: g.shape for name, g in got.items()} == {
        name: (0, *p.shape) for name, p in model.named_parameters()
    }
    with opacus.use(opacus.EVERY_LAYER):
        norms, grads = ghost(model, x, 1.0)
    assert norms.shape == (0,)
    assert all(g.count_nonzero() == 0 for g in grads.values())


def test_frozen_parameters():
    model, x = case("2d, dilated")
    model.weight.requires_grad_(False)
    with opacus.use():
        got = opacus_grads(model, x)
        norms, grads = ghost(model, x, 1.0)
    expected = grads_one_by_one(model, squared_loss, (x,))
    torch.testing.assert_close(got, expected)
    expected_norms, expected_sum = clipped_one_by_one(model, x, 1.0)
    assert grads.pop("weight") is None
    torch.testing.assert_close((norms, grads), (expected_norms, expected_sum))


def test_autocast():
    model, x = case("2d, strided groups", dtype=torch.float32)
    net = nn.Sequential(model, nn.Flatten(), nn.Linear(6 * 5 * 7, 3))
    expected = grads_one_by_one(copy.deepcopy(net).double(), squared_loss, (x.double(),))

    def loss(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return squared_loss(lambda x: model(x).float(), x)

    with opacus.use():
        got = opacus_grads(net, x, loss)
    for name, grads in expected.items():
        assert (got[name].double() - grads).norm() < 0.03 * grads.norm(), name


def test_an_input_without_a_batch_axis_is_refused():
    model, x = case("2d, dilated")
    with opacus.use(), pytest.raises(ShapeError, match=r"Conv2d\(4, 6.* 3 axes, a batch has 4"):
        opacus_grads(model, x[0], lambda m, x: m(x).sum())
