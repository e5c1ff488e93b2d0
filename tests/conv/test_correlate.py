"""`correlate` on layers that are not depthwise, which it takes on CPUs with short vectors."""

import pytest
import torch

from psgrad.conv import ConvGeometry
from psgrad.conv.planner import choose
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES, correlate
from tests import oracle
from tests.machines import AMD, INTEL, on

CORRELATE = STRATEGIES["correlate"]
LAYERS = {
    "3-D": ((16, 17, 3, 2, 3), (5, 4, 6), 1),
    "3-D, unpadded": ((18, 16, 2, 2, 2), (6, 5, 6), 0),
    "2-D": ((64, 65, 3, 3), (28, 29), 1),
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(correlate, "short_vectors", lambda: True)
    choose.cache_clear()
    yield
    choose.cache_clear()


def operands(layer, samples, *, stride=1, dilation=1, dtype=torch.float32):
    shape, size, padding = LAYERS[layer]
    geometry = ConvGeometry(shape[2:], stride, padding, dilation)
    x = torch.randn(samples, shape[1], *size, dtype=dtype)
    grad = torch.randn(samples, shape[0], *geometry.output_size(size), dtype=dtype)
    return x, grad, shape, geometry


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_loop(short, layer, samples, channels_last):
    x, grad, shape, geometry = operands(layer, samples)
    if channels_last:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    expected = oracle.weight_grads(x.double(), grad.double(), shape, padding=LAYERS[layer][2])
    normalised = normalise(x, grad, shape, geometry)
    assert CORRELATE.refusal(normalised[2], "grads") is None
    grads = CORRELATE.grads(*normalised)
    assert grads.is_contiguous()
    torch.testing.assert_close(grads.double(), expected, rtol=1e-4, atol=1e-4)
    norms = CORRELATE.sq_norms(*normalised)
    torch.testing.assert_close(norms.double(), expected.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "changed", "why"),
    [
        ("3-D", {"stride": 2}, "strides and dilation"),
        ("3-D", {"dilation": 2}, "strides and dilation"),
        ("3-D", {"dtype": torch.float64}, "other dtypes"),
        ("3-D", {"dtype": torch.bfloat16}, "other dtypes"),
    ],
)
def test_what_was_measured_to_be_slower_is_refused(short, layer, changed, why):
    problem = normalise(*operands(layer, 2, **changed))[2]
    assert why in CORRELATE.refusal(problem, "grads")


def test_groups_and_several_rows_a_sample_are_refused(short):
    x, grad, shape, geometry = operands("3-D", 4)
    assert "several rows" in CORRELATE.refusal(normalise(x, grad, shape, geometry, 2)[2], "grads")
    grouped = ConvGeometry(shape[2:], padding=1, groups=2)
    problem = normalise(x[:, :16], grad[:, :16], (16, 8, *shape[2:]), grouped)[2]
    assert "with groups" in CORRELATE.refusal(problem, "grads")


def test_long_vectors_leave_dense_layers_to_the_others(monkeypatch):
    monkeypatch.setattr(correlate, "short_vectors", lambda: False)
    assert "not depthwise" in CORRELATE.refusal(normalise(*operands("3-D", 2))[2], "grads")


def test_the_planner_takes_it_for_3d_layers_on_short_vectors(short):
    shape, size = (64, 64, 3, 3, 3), (8, 28, 28)
    geometry = ConvGeometry(shape[2:], padding=1)
    x = torch.empty(1, 64, *size).expand(4, 64, *size)
    problem = normalise(x, x, shape, geometry)[2]
    assert choose(problem, "grads").chosen == choose(problem, "sq_norms").chosen == "correlate"


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "size", "stride", "padding", "dilation"),
    [
        ((10,), (203,), 5, 2, 1),
        ((3,), (40,), 1, 0, 4),
        ((3, 5), (12, 17), 2, 1, 1),
        ((2, 2, 2), (5, 4, 6), 1, 1, 2),
    ],
)
def test_samples_of_one_channel_are_the_groups(samples, rows, kernel, size, stride, padding, dilation):
    geometry, shape = ConvGeometry(kernel, stride, padding, dilation), (6, 1, *kernel)
    x = torch.randn(samples * rows, 1, *size)
    grad = torch.randn(samples * rows, 6, *geometry.output_size(size))
    expected = oracle.weight_grads(
        x.double(),
        grad.double(),
        shape,
        rows_per_sample=rows,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    with on(AMD):
        normalised = normalise(x, grad, shape, geometry, rows)
        assert CORRELATE.refusal(normalised[2], "grads") is None
        grads, norms = CORRELATE.grads(*normalised), CORRELATE.sq_norms(*normalised)
    torch.testing.assert_close(grads.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms.double(), expected.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)
    with on(INTEL):
        assert "not depthwise" in CORRELATE.refusal(normalised[2], "grads")


def test_the_planner_takes_it_for_audio_where_products_are_slow():
    geometry, x = ConvGeometry((10,), 5), torch.empty(8, 1, 8000)
    problem = normalise(x, torch.empty(8, 128, 1599), (128, 1, 10), geometry)[2]
    with on(AMD):
        assert choose(problem, "grads").chosen == choose(problem, "sq_norms").chosen == "correlate"
        alone = normalise(x[:1], torch.empty(1, 128, 1599), (128, 1, 10), geometry)[2]
        assert choose(alone, "grads").chosen == "loop"
