"""Products by oneDNN: what MKL gives, of any layout, and only where they are plain large matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from psgrad import PerSampleGrads, clip_per_sample
from psgrad.conv import ConvGeometry, products
from psgrad.conv.choice import plan
from psgrad.conv.products import add_product, batched, by_onednn, product
from tests.machines import AMD, AMD_AVX2, AMD_HALVES, INTEL, on

CPU = torch.device("cpu")


@pytest.fixture
def taken(monkeypatch):
    """On a machine whose MKL is slow, with no product too small: the shapes that oneDNN was given."""
    shapes = []
    original = products._by_onednn

    def counted(left, right):
        shapes.append((tuple(left.shape), tuple(right.shape)))
        return original(left, right)

    monkeypatch.setattr(products, "_by_onednn", counted)
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "LEAST_INNER", 1)
    with on(AMD):
        yield shapes


def test_whose_mkl_is_slow():
    for cpu, slow in ((AMD, torch.backends.mkl.is_available()), (INTEL, False), (AMD_AVX2, False)):
        with on(cpu):
            assert by_onednn(2.0**30, 1024, torch.float32, CPU, 8) is slow
            assert not by_onednn(2.0**30, 1024, torch.float64, CPU, 8)
            assert not by_onednn(2.0**30, 1024, torch.bfloat16, CPU, 8)
            assert not by_onednn(2.0**20, 1024, torch.float32, CPU, 8)
            assert not by_onednn(2.0**30, 16, torch.float32, CPU, 8)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
def test_only_a_single_product_where_long_vectors_are_taken_in_halves(monkeypatch):
    left, right = torch.randn(2, 128, 256), torch.randn(2, 256, 512)
    shapes, original = [], products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda *ab: shapes.append(ab[0].shape) or original(*ab))
    with on(AMD_HALVES):
        assert not by_onednn(2.0**30, 1024, torch.float32, CPU, 2)
        assert by_onednn(2.0**30, 16, torch.float32, CPU, 1)
        assert not by_onednn(2.0**20, 16, torch.float32, CPU, 1)
        expected = left.double() @ right.double()
        torch.testing.assert_close(batched(left, right).double(), expected, rtol=1e-5, atol=1e-3)
        assert not shapes
        torch.testing.assert_close(batched(left[:1], right[:1]), expected[:1].float(), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(product(left[0], right[0]), expected[0].float(), rtol=1e-5, atol=1e-3)
        assert len(shapes) == 2
        transposed = left[0].T.contiguous().T
        torch.testing.assert_close(product(transposed, right[0]), expected[0].float(), rtol=1e-5, atol=1e-3)
        assert len(shapes) == 2


def laid_out(shape, layout):
    *batch, rows, columns = shape
    if layout == "transposed":
        return torch.randn(*batch, columns, rows).mT
    if layout == "part":
        return torch.randn(*batch, rows + 2, 3 * columns)[..., 1:-1, 1::3]
    if layout == "expanded":
        return torch.randn(*batch, rows, 1).expand(shape)
    return torch.randn(shape)


LAYOUTS = st.sampled_from(["contiguous", "transposed", "part", "expanded"])
SIZES = st.integers(1, 20)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
@given(sizes=st.tuples(SIZES, SIZES, SIZES, SIZES), layouts=st.tuples(LAYOUTS, LAYOUTS), into=st.booleans())
def test_the_same_products_of_any_layout(sizes, layouts, into):
    count, rows, inner, columns = sizes
    left, right = laid_out((count, rows, inner), layouts[0]), laid_out((count, inner, columns), layouts[1])
    expected = left.double() @ right.double()
    close = {"rtol": 1e-5, "atol": 1e-5 * inner}
    with pytest.MonkeyPatch.context() as patch, on(AMD):
        patch.setattr(products, "LARGE", 1)
        patch.setattr(products, "LEAST_INNER", 1)
        out = torch.full((count, rows, columns), float("nan")) if into else None
        found = batched(left, right, out)
        assert out is None or found is out
        torch.testing.assert_close(found.double(), expected, **close)
        torch.testing.assert_close(product(left[0], right[0]).double(), expected[0], **close)
        total = torch.ones(rows, columns)
        add_product(total, left[0], right[0])
        torch.testing.assert_close(total.double(), 1 + expected[0], **close)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
def test_only_plain_matrices_are_left_to_it(taken):
    a = torch.randn(32, 32)
    assert torch.equal(product(a, a), torch.ops.mkldnn._linear_pointwise(a, a.mT, None, "none", [], ""))
    assert len(taken) == 1
    product(a.double(), a.double())
    product(a.bfloat16(), a.bfloat16())
    recorded = a.clone().requires_grad_()
    product(recorded, a).sum().backward()
    torch.testing.assert_close(recorded.grad, a.sum(1).expand(32, 32))
    torch.testing.assert_close(torch.vmap(product, (0, None))(a.expand(3, 32, 32), a)[1], a @ a)
    torch.testing.assert_close(torch.func.grad(lambda x: product(x, a).sum())(a), recorded.grad)
    with torch.backends.mkldnn.flags(enabled=False):
        product(a, a)
    assert len(taken) == 1
    with torch.no_grad():
        product(recorded, a)
    assert len(taken) == 2
    nan = torch.full((32, 32), float("nan"))
    assert product(nan, a).isnan().all()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
@pytest.mark.parametrize("positions", [(), (3,), (17, 2)])
@pytest.mark.parametrize("samples", [1, 5])
def test_linear_layers_go_through_it(taken, positions, samples):
    layer, x = nn.Linear(12, 7), torch.randn(samples, *positions, 12)
    factor = torch.randn(samples, *positions, 7)
    grads = torch.einsum("n...o,n...i->noi", factor.double(), x.double())
    biases = factor.double().reshape(samples, -1, 7).sum(1)
    norms = (grads.square().sum((1, 2)) + biases.square().sum(1)).sqrt()
    with PerSampleGrads(layer, "sum"):
        (layer(x) * factor).sum().backward()
    torch.testing.assert_close(layer.weight.grad_sample.double(), grads, rtol=1e-5, atol=1e-5)
    layer.zero_grad()
    with clip_per_sample(layer, 2.0, loss_reduction="sum") as clip:
        (layer(x) * factor).sum().backward()
    torch.testing.assert_close(clip.result.norms.double(), norms, rtol=1e-5, atol=0.0)
    clipped = torch.einsum("n,noi->oi", (2.0 / norms).clamp(max=1), grads)
    torch.testing.assert_close(layer.weight.grad.double(), clipped, rtol=1e-4, atol=1e-5)
    assert taken


def test_the_planner_knows_of_both_libraries():
    x, grad = torch.empty(8, 64, 56, 56), torch.empty(8, 256, 56, 56)
    seconds = {}
    for cpu in (INTEL, AMD):
        with on(cpu):
            found = plan(x, grad, (256, 64, 1, 1), ConvGeometry((1, 1)), "grads")
            small = plan(x[..., :4, :4], grad[..., :4, :4], (256, 64, 1, 1), ConvGeometry((1, 1)), "grads")
            seconds[cpu] = found.costs["unfold"].slowdown, small.costs["unfold"].slowdown
    assert seconds[INTEL] == (1.0, 1.0)
    assert seconds[AMD] == (1.0, products.SLOWDOWN)
