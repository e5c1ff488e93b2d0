"""The Triton kernels: natively on a GPU, in Triton's interpreter without one."""

import pytest
import torch

from psgrad.conv import ConvGeometry, weight_grad_sq_norms, weight_grads
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES
from psgrad.conv.strategies.triton.kernels import weight_grad_kernel
from psgrad.conv.strategies.triton.launch import launch
from psgrad.conv.strategies.triton.tiles import CHANNELWISE, PRODUCT, suiting
from psgrad.errors import StrategyError
from tests import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = {
    "more than a tile of every axis": ((70, 66, 1, 1), ConvGeometry(1), (9, 9), 1),
    "stride, dilation, padding": ((5, 4, 3, 2), ConvGeometry((3, 2), (2, 1), 1, (1, 2)), (9, 7), 1),
    "several rows a sample": ((5, 4, 3, 3), ConvGeometry(3, padding=1), (5, 5), 3),
    "groups": ((6, 2, 3, 3), ConvGeometry(3, groups=3), (5, 6), 1),
    "depthwise": ((20, 1, 3, 3), ConvGeometry(3, padding=1, groups=20), (7, 5), 1),
    "channel multiplier": ((6, 1, 3, 3), ConvGeometry(3, padding=1, groups=3), (7, 5), 2),
    "one input channel": ((6, 1, 5), ConvGeometry(5, padding=2), (300,), 1),
    "3-D": ((3, 2, 2, 3, 2), ConvGeometry((2, 3, 2), 1, (1, 1, 0)), (3, 4, 3), 1),
    "transposed": (
        (4, 2, 3, 3),
        ConvGeometry(3, 2, 1, transposed=True, output_padding=1, groups=2),
        (4, 3),
        1,
    ),
}


@pytest.fixture(params=CASES)
def problem(request):
    torch.manual_seed(0)
    weight_shape, geometry, size, rows_per_sample = CASES[request.param]
    first, second = weight_shape[0], weight_shape[1] * geometry.groups
    in_channels, out_channels = (first, second) if geometry.transposed else (second, first)
    out_size = geometry.at(weight_shape[2:]).output_size(size)
    x = torch.randn(2 * rows_per_sample, in_channels, *size, device=DEVICE)
    grad = torch.randn(2 * rows_per_sample, out_channels, *out_size, device=DEVICE)
    expected = weight_grads(
        x.double(), grad.double(), weight_shape, geometry, "loop", rows_per_sample=rows_per_sample
    )
    return x, grad, weight_shape, geometry, rows_per_sample, expected


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_every_epilogue(problem, store, square):
    x, grad, weight_shape, geometry, rows_per_sample, expected = problem
    grads, norms = launch(
        *normalise(x, grad, weight_shape, geometry, rows_per_sample),
        store=store,
        square=square,
        precision="ieee",
    )
    assert (grads is not None, norms is not None) == (store, square)
    if grads is not None:
        torch.testing.assert_close(grads.double(), expected, rtol=1e-4, atol=1e-4)
    if norms is not None:
        torch.testing.assert_close(norms.double(), expected.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", [*PRODUCT, *CHANNELWISE], ids=str)
def test_every_tile(tile):
    groups = 1 if "BLOCK_O" in tile.kwargs else 70
    shape, geometry = (70, 66 if groups == 1 else 1, 2), ConvGeometry(2, stride=2, padding=1, groups=groups)
    x, grad = torch.randn(2, shape[1] * groups, 9, device=DEVICE), torch.randn(2, 70, 5, device=DEVICE)
    expected = weight_grads(x.double(), grad.double(), shape, geometry, "loop")
    grads, norms = launch(
        *normalise(x, grad, shape, geometry), store=True, square=True, precision="ieee", tile=tile
    )
    torch.testing.assert_close(grads.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms.double(), expected.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)


def test_the_fastest_tile_is_taken_and_only_its_sums_are_added(monkeypatch):
    """The buffer of sums is as long as the smallest tile needs: what lies behind a larger one's stays out."""
    monkeypatch.setattr(
        weight_grad_kernel, "early_config_prune", lambda tiles, _, **constants: suiting(tiles, constants)
    )
    monkeypatch.setattr(weight_grad_kernel, "cache", {})
    shape, geometry = (70, 66, 1), ConvGeometry(1)
    x, grad = torch.randn(2, 66, 5, device=DEVICE), torch.randn(2, 70, 5, device=DEVICE)
    expected = weight_grads(x.double(), grad.double(), shape, geometry, "loop").flatten(1).square().sum(1)
    for tile in suiting(PRODUCT, {"OUT_C": 70, "IN_C": 66, "T_BUCKET": 8}):
        timings = {str(tile): 1.0}
        monkeypatch.setattr(
            weight_grad_kernel,
            "_bench",
            lambda *_, config, faster=timings, **__: [faster.get(str(config), 2.0)] * 3,
        )
        weight_grad_kernel.cache.clear()
        _, norms = launch(*normalise(x, grad, shape, geometry), store=False, square=True, precision="ieee")
        assert str(weight_grad_kernel.best_config) == str(tile)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "positions", "blocks"),
    [
        ((512, 512), 4096, {(64, 32), (64, 64), (128, 64), (128, 128)}),
        ((64, 64), 4096, {(32, 32), (64, 16), (64, 32), (64, 64)}),
        ((64, 3), 4096, {(16, 16), (64, 16)}),
        ((1, 2), 9, {(16, 16)}),
    ],
)
def test_tiles_that_suit(channels, positions, blocks):
    found = suiting(PRODUCT, {"OUT_C": channels[0], "IN_C": channels[1], "T_BUCKET": positions})
    assert {(tile.kwargs["BLOCK_O"], tile.kwargs["BLOCK_I"]) for tile in found} == blocks
    assert all(16 <= tile.kwargs["BLOCK_T"] <= max(16, positions) for tile in found)
    assert len({str(tile) for tile in found}) == len(found) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(problem, dtype):
    x, grad, *rest, rows_per_sample, _ = problem
    x, grad = x.to(dtype), grad.to(dtype)
    expected = weight_grads(x.double(), grad.double(), *rest, "loop", rows_per_sample=rows_per_sample)
    norms = weight_grad_sq_norms(x, grad, *rest, "triton", rows_per_sample=rows_per_sample)
    # products of half-precision numbers are exact in float32, and nothing is rounded to half before the sum
    torch.testing.assert_close(norms.double(), expected.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)
    grads = weight_grads(x, grad, *rest, "triton", rows_per_sample=rows_per_sample)
    assert grads.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert ((grads.double() - expected).abs() <= unit * expected.abs() + 1e-4).all()


def test_the_same_every_time(problem):
    x, grad, *rest, rows_per_sample, _ = problem
    first, second = (
        weight_grad_sq_norms(x, grad, *rest, "triton", rows_per_sample=rows_per_sample) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_channels_last_is_read_in_place():
    x = torch.randn(2, 4, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    shape, geometry = (3, 4, 3, 3), ConvGeometry(3, padding=1)
    grads = weight_grads(x, grad, shape, geometry, "triton")
    expected = oracle.weight_grads(x.cpu().double(), grad.cpu().double(), shape, padding=1)
    torch.testing.assert_close(grads.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="about tensors on a CPU")
def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x = torch.randn(1, 2, 3)
    with pytest.raises(StrategyError, match=r"'triton' refuses grads.*compiles for CUDA"):
        weight_grads(x, x, (2, 2, 1), ConvGeometry(1), "triton")
    assert "triton" in STRATEGIES


@pytest.fixture
def _precisions_are_put_back():
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")  # which alone undoes the older setting
    convolutions.fp32_precision, products.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        (lambda: None, "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"), "ieee"),
    ],
    ids=["by default", "older setting", "products in TF32", "convolutions exactly"],
)
@pytest.mark.usefixtures("_precisions_are_put_back")
def test_the_precision_is_what_pytorch_is_set_to(setting, precision, monkeypatch):
    """PyTorch's older getters raise where its newer settings were used."""
    seen = []

    def record(*args, **kwargs):
        seen.append(kwargs["precision"])
        return launch(*args, **kwargs)

    monkeypatch.setattr("psgrad.conv.strategies.triton.launch.launch", record)
    setting()
    x = torch.randn(1, 2, 4, device=DEVICE)
    weight_grads(x, x, (2, 2, 1), ConvGeometry(1), "triton")
    assert seen == [precision]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.gpu
def test_precision_says_what_it_does(precision):
    x, grad = torch.randn(4, 64, 16, 16, device="cuda"), torch.randn(4, 64, 16, 16, device="cuda")
    shape, geometry = (64, 64, 3, 3), ConvGeometry(3, padding=1)
    expected = weight_grads(x.double(), grad.double(), shape, geometry, "loop")
    grads, _ = launch(*normalise(x, grad, shape, geometry), store=True, square=False, precision=precision)
    error = (grads.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if precision == "ieee" else 1e-3)
