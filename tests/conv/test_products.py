"""Products by oneDNN: what MKL gives, of any layout, and only where they are plain large matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psgrad.conv import ConvGeometry, products, weight_grad_sq_norms, weight_grads, weighted_weight_grad
from psgrad.conv.choice import plan
from psgrad.conv.products import add_product, batched, by_onednn, product
from tests.machines import AMD, AMD_AVX2, INTEL, on

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
            assert by_onednn(2.0**30, 1024, torch.float32, CPU) is slow
            assert not by_onednn(2.0**30, 1024, torch.float64, CPU)
            assert not by_onednn(2.0**30, 1024, torch.bfloat16, CPU)
            assert not by_onednn(2.0**20, 1024, torch.float32, CPU)
            assert not by_onednn(2.0**30, 16, torch.float32, CPU)


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


# channels, size, kernel, stride, padding
LAYERS = {
    "3x3": (8, 16, (9, 11), 3, 1, 1),
    "1x1": (16, 12, (7, 5), 1, 1, 0),
    "1x1/2": (16, 12, (7, 5), 1, 2, 0),
    "2x2/2": (5, 16, (8, 6), 2, 2, 0),
    "large": (16, 16, (40, 40), 3, 1, 1),
}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is left to oneDNN")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strategy", ["unfold", "loop"])
def test_what_layers_make_of_them_is_right(taken, layer, samples, layout, strategy):
    inputs, outputs, size, kernel, stride, padding = LAYERS[layer]
    geometry = ConvGeometry((kernel, kernel), stride, padding)
    x = torch.randn(samples, inputs, *size).to(memory_format=layout)
    shape = outputs, inputs, kernel, kernel
    output = torch.nn.functional.conv2d(x, torch.randn(shape), None, stride, padding)
    grad = torch.randn_like(output).to(memory_format=layout)
    of = torch.nn.grad.conv2d_weight
    parts = zip(x.double().split(1), grad.double().split(1), strict=True)
    expected = torch.stack([of(a, shape, g, stride, padding) for a, g in parts])
    close = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
    found = weight_grads(x, grad, shape, geometry, strategy)
    torch.testing.assert_close(found.double(), expected, **close)
    assert found.is_contiguous()
    norms = weight_grad_sq_norms(x, grad, shape, geometry, strategy)
    torch.testing.assert_close(norms.double(), expected.square().sum((1, 2, 3, 4)), rtol=1e-4, atol=0.0)
    factors = torch.rand(samples)
    total = weighted_weight_grad(x, grad, shape, geometry, factors)
    torch.testing.assert_close(
        total.double(), torch.einsum("n,n...->...", factors.double(), expected), **close
    )
    if strategy == "unfold":
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
