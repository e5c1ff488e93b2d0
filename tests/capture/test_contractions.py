"""Products of the batch with a parameter over any axes: `einsum`, `tensordot`, `matmul`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from psgrad import GradNorms, PerSampleGrads, clip_per_sample
from psgrad.capture import KeptGrads, LayerUse
from psgrad.capture.computed import Carried
from psgrad.errors import PsgradError
from tests.model_oracle import assert_clipped, assert_written_out, grads_one_by_one, squared_loss


class Product(nn.Module):
    """`use(h, weight)`."""

    def __init__(self, use, *shape):
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, h):
        return self.use(h, self.weight)


def model_of(use, *shape, shape_of_x=(5, 3)):
    """What is given to the product needs gradients, and is not the model's input."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(shape_of_x[-1], shape_of_x[-1]), Product(use, *shape)).double()


def einsum(equation):
    return lambda h, w: torch.einsum(equation, h, w)


# of [N, 5, 3], or of [N, 2, 5, 3]
KNOWN = {
    "linear": (einsum("btc,oc->bto"), 4, 3),
    "transposed": (einsum("btc,co->bto"), 3, 4),
    "implicit": (einsum("abi,ij"), 3, 4),
    "spaces": (einsum("b t c, o c -> b t o"), 4, 3),
    "dots": (einsum("...c,oc->...o"), 4, 3),
    "dots in front": (einsum("b...,o...->bo"), 4, 5, 3),
    "dots, implicit": (einsum("...c,co"), 3, 4),
    "operands the other way round": (lambda h, w: torch.einsum("oc,btc->bto", w, h), 4, 3),
    "operands in a list": (lambda h, w: torch.einsum("btc,oc->bto", [h, w]), 4, 3),
    "by numbers": (lambda h, w: torch.einsum(h, [0, 1, 2], w, [3, 2], [0, 1, 3]), 4, 3),
    "letters in capitals": (einsum("A...B,CB->AC..."), 4, 3),
    "over positions": (einsum("btc,st->bsc"), 4, 5),
    "over all": (einsum("btc,tco->bo"), 5, 3, 4),
    "a number for each": (lambda h, w: torch.einsum("btc,tc->b", h, w)[:, None], 5, 3),
    "a vector": (einsum("btc,c->bt"), 3),
    "heads of outputs": (einsum("btc,hcd->bhtd"), 2, 3, 4),
    "a map for each position": (einsum("btc,tco->bto"), 5, 3, 4),
    "a map for each, its outputs first": (einsum("btc,otc->bot"), 4, 5, 3),
    "a map for each channel": (einsum("btc,cto->bco"), 3, 5, 4),
    "nothing but outputs": (einsum("btc,o->btco"), 4),
    "axes summed away": (einsum("btc,ocs->bo"), 4, 3, 2),
    "a scale": (einsum("btc,c->btc"), 3),
    "a scale for each": (einsum("btc,tc->bct"), 5, 3),
    "tensordot": (lambda h, w: torch.tensordot(h, w, 1), 3, 4),
    "tensordot, of two axes": (lambda h, w: torch.tensordot(h, w), 5, 3, 4),
    "tensordot, of axes by number": (lambda h, w: torch.tensordot(h, w, dims=([1, -1], [2, 0])), 3, 4, 5),
    "tensordot, of axes by a tensor": (lambda h, w: torch.tensordot(h, w, torch.tensor([[1], [0]])), 5, 4),
    "tensordot, weight first": (lambda h, w: torch.tensordot(w, h, ([1], [2])).movedim(1, 0), 4, 3),
    "a product from the left": (lambda h, w: w @ h, 4, 5),
    "a vector by matmul": (lambda h, w: h @ w, 3),
    "a vector from the left": (lambda h, w: torch.matmul(w, h), 5),
    "a vector by linear": (lambda h, w: F.linear(h, w), 3),
    "a vector by linear, with a bias": (lambda h, w: F.linear(h, w[:3], w[3]), 4),
    "heads by matmul": (lambda h, w: h[:, None] @ w, 2, 3, 4),
    "heads with an axis for the batch": (lambda h, w: h[:, None] @ w, 1, 2, 3, 4),
    "one head by matmul": (lambda h, w: h[:, None] @ w, 1, 3, 4),
    "heads by matmul of vectors": (lambda h, w: (h.mean(1) @ w).movedim(1, 0), 2, 3, 4),
    "heads from the left": (lambda h, w: w @ h.unflatten(-1, (1, 3)).transpose(1, 2), 1, 4, 5),
    "heads for each": (lambda h, w: torch.matmul(h.unsqueeze(2), w), 5, 3, 4),
    "by a weight in another order": (lambda h, w: torch.einsum("btc,oc->bto", h, w.T.reshape(4, 3)), 3, 4),
    "by a weight that is computed": (lambda h, w: torch.einsum("btc,oct->bo", h, w.tanh()), 4, 3, 5),
}
REARRANGED = {
    "linear, transposed": (lambda h, w: F.linear(h, w.T), 3, 4),
    "linear, reshaped": (lambda h, w: F.linear(h, w.flatten(1)), 4, 3, 1),
    "convolution, in another order": (
        lambda h, w: F.conv1d(h.mT, w.permute(2, 0, 1).contiguous()).mT,
        *(3, 2, 4),
    ),
    "linear, through a row": (lambda h, w: F.linear(h, w.view(1, -1).unflatten(1, (3, 4)).squeeze(0).mT), 12),
    "product, transposed twice": (lambda h, w: h @ w.mT.transpose(0, 1), 3, 4),
}
UNKNOWN = {
    "repeated letters": (einsum("btc,cc->btc"), 3, 3),
    "three operands": (lambda h, w: torch.einsum("btc,oc,bt->bto", h, w, h.mean(2)), 4, 3),
    "an axis of one, repeated": (lambda h, w: torch.einsum("btc,oc->bto", h.mean(2, keepdim=True), w), 4, 3),
    "time first": (lambda h, w: torch.einsum("tbc,oc->bto", h.transpose(0, 1), w), 4, 3),
}


@pytest.mark.parametrize(("rows", "rows_per_sample"), [(1, 1), (5, 1), (6, 2), (10, 2)])
@pytest.mark.parametrize("name", KNOWN | REARRANGED | UNKNOWN)
def test_exact(name, rows, rows_per_sample):
    model = model_of(*(KNOWN | REARRANGED | UNKNOWN)[name])
    x = torch.randn(rows, 5, 3, dtype=torch.double)
    expected = model(x)
    with PerSampleGrads(model, rows_per_sample=rows_per_sample):
        torch.testing.assert_close(model(x), expected)
    assert assert_clipped(model, x, clip_per_sample, rows_per_sample) == (["1"] if name in UNKNOWN else [])


@pytest.mark.parametrize("name", KNOWN | REARRANGED)
def test_written_out_and_an_empty_batch(name):
    assert_written_out(
        model_of(*(KNOWN | REARRANGED)[name]), lambda rows: torch.randn(rows, 5, 3, dtype=torch.double)
    )


LAYOUTS = {
    "turned": lambda h: h.mT.contiguous().mT,
    "every other": lambda h: h.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda h: h[:, :1].expand(-1, 5, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KNOWN)
def test_any_memory_layout(name, layout):
    use, *shape = KNOWN[name]
    model = model_of(lambda h, w: use(LAYOUTS[layout](h), w), *shape)
    assert assert_clipped(model, torch.randn(4, 5, 3, dtype=torch.double), clip_per_sample, 2) == []


NOT_IN_ORDER = {
    *("axes summed away", "a scale", "a scale for each", "by a weight that is computed"),
    "a vector by linear, with a bias",
}


@pytest.mark.parametrize("name", [name for name in KNOWN | REARRANGED if name not in NOT_IN_ORDER])
def test_of_a_weight_in_another_order_nothing_is_carried_for_norms(name, monkeypatch):
    """Its elements are a parameter's: what a layer tells of its gradient holds for the parameter."""
    monkeypatch.setattr(Carried, "_sq_norms_carried", None)
    monkeypatch.setattr(Carried, "grads", None)
    model = model_of(*(KNOWN | REARRANGED)[name])
    x = torch.randn(6, 5, 3, dtype=torch.double)
    for held_as in (LayerUse.kept, lambda use: use):
        monkeypatch.setattr(LayerUse, "kept", held_as)
        assert assert_clipped(model, x, clip_per_sample, 2) == []


MIXING = {
    "over the batch": (einsum("btc,bd->tcd"), 5, 4),
    "each with its own": (einsum("btc,bc->btc"), 5, 3),
    "batch first": (lambda h, w: torch.tensordot(w, h, ([1], [0])).movedim(1, 0), 5, 5),
    "from the left": (lambda h, w: (w @ h.flatten(1)).unflatten(1, (5, 3)), 5, 5),
    "heads for samples": (lambda h, w: h @ w, 5, 3, 4),
}


@pytest.mark.parametrize("name", MIXING)
def test_products_over_the_batch_are_refused(name):
    model = model_of(*MIXING[name])
    with PerSampleGrads(model), pytest.raises(PsgradError, match=r"mixes|fewer or more|vmap could not"):
        squared_loss(model, torch.randn(5, 5, 3, dtype=torch.double)).backward()


@st.composite
def equations(draw):
    """x and w over some of these axes, and a result that has any of theirs, the batch in front or not."""
    sizes = {"n": 3, "b": 2, "c": 3, "d": 1, "e": 2}
    of_x = "n" + "".join(draw(st.permutations(draw(st.lists(st.sampled_from("bcde"), unique=True)))))
    of_w = "".join(draw(st.lists(st.sampled_from("bcde"), unique=True, min_size=1)))
    others = sorted({*of_x[1:], *of_w})
    rest = draw(st.permutations(draw(st.lists(st.sampled_from(others), unique=True))))
    terms = [of_x, of_w]
    if draw(st.booleans()):
        terms.reverse()
    return f"{','.join(terms)}->n{''.join(rest)}", of_x, [sizes[a] for a in of_x], [sizes[a] for a in of_w]


@given(equations())
def test_any_equation(drawn):
    equation, of_x, shape_of_x, shape_of_w = drawn
    weight_first = not equation.startswith(of_x + ",")

    def use(h, w):
        out = torch.einsum(equation, *((w, h) if weight_first else (h, w)))
        return out.reshape(len(out), -1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.PReLU(), Product(use, *shape_of_w)).double()
    x = torch.randn(shape_of_x, dtype=torch.double)
    assert assert_clipped(model, x, clip_per_sample) == []


@pytest.mark.parametrize("name", ["heads of outputs", "over positions", "a map for each position", "linear"])
def test_in_half_precision(name):
    model = model_of(*KNOWN[name])
    x = torch.randn(6, 5, 3)
    expected = grads_one_by_one(model, squared_loss, [x.double()])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    low = copy.deepcopy(model).bfloat16()
    with GradNorms(low) as handle:
        squared_loss(low, x.bfloat16()).backward()
    torch.testing.assert_close(handle.norms.double(), norms, rtol=0.05, atol=0.01)
    with GradNorms(model.float()) as handle, torch.autocast("cpu", torch.bfloat16):
        model(x).float().sin().flatten(1).sum(1).mean().backward()
    assert handle.norms.isfinite().all()
    assert handle.regions == {}


def test_a_product_is_a_layer_like_any_for_what_is_held():
    """Not written out, where its weight is large and its positions few."""
    model = model_of(einsum("btc,hcd->bhtd"), 8, 3, 40)
    with PerSampleGrads(model) as handle:
        kinds, add = set(), handle.add
        handle.add = lambda c: (kinds.add(type(c)), add(c))
        squared_loss(model, torch.randn(4, 5, 3, dtype=torch.double)).backward()
    assert KeptGrads not in kinds


@pytest.mark.parametrize(
    "name", ["heads of outputs", "a map for each position", "a map for each channel", "over all"]
)
@pytest.mark.parametrize("rows_per_sample", [1, 2])
def test_a_sample_that_is_not_finite_adds_nothing(name, rows_per_sample):
    model = model_of(*KNOWN[name])
    x = torch.randn(6, 5, 3, dtype=torch.double)
    with clip_per_sample(model, 1e9, "sum", rows_per_sample=rows_per_sample):
        squared_loss(model, x[rows_per_sample:]).mul(len(x) - rows_per_sample).backward()
        expected = {path: p.grad.clone() for path, p in model.named_parameters()}
        model.zero_grad()
        x[0, 2, 1] = torch.inf
        squared_loss(model, x).mul(len(x)).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[path])


def test_a_product_into_a_tensor_is_refused_as_without():
    model = model_of(lambda h, w: torch.tensordot(h, w, 1, out=h.new_empty(len(h), 5, 4)), 3, 4)
    with PerSampleGrads(model), pytest.raises(PsgradError, match="because: tensordot into a tensor"):
        model(torch.randn(5, 5, 3, dtype=torch.double))
