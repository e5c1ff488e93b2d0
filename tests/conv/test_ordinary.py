"""The ordinary weight gradient as a matrix product: each form, where it is taken, against autograd."""

import pytest
import torch
import torch.nn.functional as F

from psgrad.conv import ConvGeometry, ordinary
from psgrad.conv.ordinary import (
    as_product,
    ordinary_weight_grad,
    write_ordinary_weight_grad,
    writes_anywhere,
)
from psgrad.conv.problem import normalise
from tests.machines import AMD_HALVES, on

# channels, kernel, stride, padding, dilation, groups, input size, form
CASES = {
    "one position": ((6, 4), 3, 1, 0, 1, 1, (3, 3), "_per_group"),
    "one position, groups": ((6, 4), 3, 1, 0, 1, 2, (3, 3), "_per_group"),
    "few positions": ((6, 4), 3, 1, 1, 1, 1, (2, 2), "_of_positions"),
    "few positions, stride and dilation": ((6, 4), 3, 2, 2, 2, 1, (3, 4), "_of_positions"),
    "1-D": ((6, 4), 5, 2, 1, 1, 1, (9,), "_of_positions"),
    "3-D": ((3, 2), 2, 1, 0, 1, 1, (2, 3, 2), "_of_positions"),
    "one element": ((6, 4), 1, 1, 0, 1, 1, (4, 4), "_of_positions"),
    "one element, stride": ((6, 4), 1, 2, 0, 1, 1, (7, 8), "_of_positions"),
    "one element, many positions": ((6, 4), 1, 1, 0, 1, 1, (5, 7), "_row_by_row"),
    "one element, many positions, stride": ((6, 4), 1, 2, 0, 1, 1, (9, 11), "_row_by_row"),
    "one element, padded": ((6, 4), 1, 1, 1, 1, 1, (5, 5), "_row_by_row"),
    "many positions": ((6, 4), 3, 1, 1, 1, 1, (5, 5), None),
    "groups": ((6, 4), 1, 1, 0, 1, 2, (4, 4), None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "expanded"])
@pytest.mark.parametrize("small", [0, ordinary.SMALL_BYTES])
@pytest.mark.parametrize("rows", [1, 5])
def test_each_form_is_the_gradient_of_autograd(name, layout, rows, small, monkeypatch):
    monkeypatch.setattr(ordinary, "SMALL_BYTES", small)
    (inputs, outputs), k, stride, padding, dilation, groups, size, form = CASES[name]
    rank = len(size)
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, *size, dtype=torch.float64)
    weight = torch.randn(outputs, inputs // groups, *(k,) * rank, dtype=torch.float64, requires_grad=True)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    out = function(x, weight, None, stride, padding, dilation, groups)
    g = torch.randn_like(out)
    if layout == "channels last":
        x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
    elif layout == "expanded":
        x, g = x[:1].expand_as(x), g[:, :1].expand_as(g)
    out = function(x, weight, None, stride, padding, dilation, groups)
    (expected,) = torch.autograd.grad(out, weight, g)
    each = (k,) * rank
    geometry = ConvGeometry(each, (stride,) * rank, (padding,) * rank, (dilation,) * rank, groups=groups)
    x, g, problem = normalise(x, g, tuple(weight.shape), geometry)
    chosen = as_product(problem)
    assert (None if chosen is None else chosen.__name__) == form
    torch.testing.assert_close(ordinary_weight_grad(x, g, problem), expected)
    assert writes_anywhere(problem) == (form in ("_per_group", "_of_positions"))
    if writes_anywhere(problem):
        block = torch.full((3, *weight.shape), torch.nan, dtype=torch.float64)
        write_ordinary_weight_grad(x, g, problem, block[1])
        torch.testing.assert_close(block[1], expected)
        assert block[0].isnan().all()
        assert block[2].isnan().all()


@pytest.mark.parametrize("piece", [1, 1000, ordinary.PIECE_BYTES])
@pytest.mark.parametrize("case", [(10, 5, 0, 1), (3, 1, 1, 2), (4, 2, 3, 1), (1, 3, 0, 1)])
def test_one_channel_of_audio_is_unfolded_in_pieces(case, piece, monkeypatch):
    monkeypatch.setattr(ordinary, "PIECE_BYTES", piece)
    kernel, stride, padding, dilation = case
    torch.manual_seed(0)
    x = torch.randn(9, 1, 47, dtype=torch.float64)
    weight = torch.randn(6, 1, kernel, dtype=torch.float64, requires_grad=True)
    out = F.conv1d(x, weight, None, stride, padding, dilation)
    g = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, weight, g)
    geometry = ConvGeometry((kernel,), (stride,), (padding,), (dilation,))
    x, g, problem = normalise(x, g, tuple(weight.shape), geometry)
    assert as_product(problem) is ordinary.in_pieces
    torch.testing.assert_close(ordinary_weight_grad(x, g, problem), expected)


def test_every_form_has_a_case():
    assert {form for *_, form in CASES.values()} == {None, "_per_group", "_of_positions", "_row_by_row"}


def test_a_copy_over_the_budget_is_not_made():
    x, g = torch.empty(40_000, 64, 2, 2, device="meta"), torch.empty(40_000, 8, 2, 2, device="meta")
    assert as_product(normalise(x, g, (8, 64, 3, 3), ConvGeometry((3, 3), padding=(1, 1)))[2]) is None


def test_half_precision_is_not_added_up_row_by_row():
    x, g = torch.empty(4, 6, 9, 9, dtype=torch.bfloat16), torch.empty(4, 4, 9, 9, dtype=torch.bfloat16)
    assert as_product(normalise(x, g, (4, 6, 1, 1), ConvGeometry((1, 1)))[2]) is None


# rows, channels, kernel, stride, size, form
IN_HALVES = [
    (1, (64, 64), 1, 1, 56, "_row_by_row"),
    (1, (128, 256), 1, 2, 16, "_row_by_row"),
    (1, (16, 64), 1, 1, 32, None),
    (64, (64, 64), 1, 1, 56, "_row_by_row"),
    (64, (64, 128), 1, 2, 112, None),
    (64, (512, 2048), 1, 1, 7, None),
    (1, (64, 64), 3, 1, 56, None),
]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
@pytest.mark.parametrize("case", IN_HALVES)
def test_where_long_vectors_are_taken_in_halves(case):
    rows, (inputs, outputs), k, stride, size, form = case
    x = torch.empty(1, 1, 1, 1).expand(rows, inputs, size, size)
    out = -(-size // stride)
    g = torch.empty(1, 1, 1, 1).expand(rows, outputs, out, out)
    geometry = ConvGeometry((k, k), (stride, stride), (k // 2, k // 2))
    with on(AMD_HALVES):
        chosen = as_product(normalise(x, g, (outputs, inputs, k, k), geometry)[2])
    assert (None if chosen is None else chosen.__name__) == form
