"""psgrad inside of Opacus, against the loop over samples; and that uninstalling leaves no trace."""

import copy
import re
from pathlib import Path

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
    DPTensorFastGradientClipping,
)
from torch import nn

from psgrad.conv import weighted_weight_grad as weighted
from psgrad.errors import ConfigError, ShapeError
from psgrad.interop import opacus
from psgrad.layers import conv
from tests.model_oracle import grads_one_by_one, squared_loss

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

IN = {1: (4, 11), 2: (4, 9, 8), 3: (4, 6, 5, 7)}
CONVOLUTIONS = {
    "1d, strided": (1, lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2)),
    "1d, same, even kernel": (1, lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2)),
    "2d, strided groups": (2, lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)),
    "2d, valid, no bias": (2, lambda: nn.Conv2d(4, 6, 3, padding="valid", bias=False)),
    "2d, dilated": (2, lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2)),
    "2d, patches": (2, lambda: nn.Conv2d(4, 6, 2, stride=2)),
    "2d, circular": (2, lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "2d, reflect, same": (2, lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect")),
    "3d, same": (3, lambda: nn.Conv3d(4, 6, 3, padding="same")),
    "3d, replicate": (3, lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate")),
    "1d transposed": (1, lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)),
    "2d transposed, groups": (2, lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)),
    "3d transposed": (3, lambda: nn.ConvTranspose3d(4, 6, 2)),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "permuted": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.fixture(autouse=True)
def tables_as_they_were():
    """No test leaves anything in Opacus."""
    before = state()
    yield
    assert state() == before


def state():
    return (
        list(GradSampleModule.GRAD_SAMPLERS.items()),
        list(GradSampleModuleFastGradientClipping.NORM_SAMPLERS.items()),
        DPTensorFastGradientClipping.__dict__["backward"],
        GradSampleModule.rearrange_grad_samples,
    )


def case(name, layout="contiguous", dtype=torch.float64):
    torch.manual_seed(0)
    rank, make = CONVOLUTIONS[name]
    return make().to(dtype), LAYOUTS[layout](torch.randn(5, *IN[rank], dtype=dtype))


def opacus_grads(model, x, loss=squared_loss, **options):
    engine = GradSampleModule(copy.deepcopy(model), **options)
    loss(engine, x).backward()
    return {name: p.grad_sample for name, p in engine._module.named_parameters() if p.requires_grad}


def ghost(model, x, max_grad_norm, ghost_clipping=True, kind=GradSampleModuleFastGradientClipping):
    """Per-sample norms and the clipped sum of Opacus's ghost mode."""
    model = copy.deepcopy(model)
    engine = kind(model, max_grad_norm=max_grad_norm, use_ghost_clipping=ghost_clipping)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=len(x),
    )
    criterion = DPLossFastGradientClipping(engine, optimizer, RowLosses())
    output = engine(x) if isinstance(engine, nn.Module) else model(x)
    criterion(output).backward()
    return engine.per_sample_gradient_norms, {name: p.grad for name, p in model.named_parameters()}


class RowLosses(nn.Module):
    """`squared_loss` before its mean over rows, for a criterion with a `reduction`."""

    reduction = "mean"

    def forward(self, out):
        weights = torch.linspace(0.5, 1.5, out.shape[1:].numel(), dtype=out.dtype).reshape(out.shape[1:])
        losses = (out.sin() * weights).flatten(1).sum(1)
        return losses if self.reduction == "none" else losses.mean()


def clipped_one_by_one(model, x, max_grad_norm):
    grads = grads_one_by_one(model, squared_loss, (x,))
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1)  # Opacus's
    return norms, {name: torch.tensordot(factors, g, 1) for name, g in grads.items()}


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


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular", bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).tanh()).relu().flatten(1))


def small(samples=6):
    torch.manual_seed(1)
    return Small().double(), torch.randn(samples, 3, 9, 9, dtype=torch.float64)


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


# ---- installing and uninstalling


def test_modules_that_were_wrapped_before_take_part_at_once():
    model, x = case("2d, circular")
    expected = grads_one_by_one(model, squared_loss, (x,))["weight"]
    engine = GradSampleModule(model)

    def error():
        engine.zero_grad()
        squared_loss(engine, x).backward()
        return (model.weight.grad_sample - expected).norm() / expected.norm()

    assert error() > 0.1
    with opacus.use():
        assert error() < 1e-12
    assert error() > 0.1


def test_twice_is_as_good_as_once():
    before = state()
    opacus.install()
    after = state()
    opacus.install()
    assert state() == after
    opacus.uninstall()
    assert state() == before
    opacus.uninstall()
    assert state() == before
    assert not opacus.installed()


def test_use_leaves_the_tables_as_they_were_after_an_exception():
    before = state()

    def fails_inside():
        with opacus.use(opacus.EVERY_LAYER):
            assert state() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert state() == before


def test_use_inside_of_install_removes_only_what_it_added():
    opacus.install()
    inside = state()
    with opacus.use(opacus.EVERY_LAYER):
        assert opacus.installed() == set(opacus.EVERY_LAYER)
    assert state() == inside
    with opacus.use():
        pass
    assert opacus.installed() == set(opacus.CONVOLUTIONS)
    opacus.uninstall()


def test_what_others_registered_meanwhile_stays():
    def theirs(layer, activations, backprops):
        raise AssertionError

    table = GradSampleModule.GRAD_SAMPLERS
    own = table[nn.Conv1d]
    with opacus.use():
        table[nn.Conv1d] = theirs
    assert table[nn.Conv1d] is theirs
    table[nn.Conv1d] = own


def test_a_layer_that_psgrad_does_not_take_over_is_refused():
    with pytest.raises(ConfigError, match="not Embedding, BatchNorm2d"):
        opacus.install([nn.Conv2d, nn.Embedding, nn.BatchNorm2d])
    assert not opacus.installed()


def test_the_example_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "opacus.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "docs/opacus.md", "exec"), {"__name__": "__main__"})
    assert not opacus.installed()
