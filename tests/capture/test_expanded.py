"""Parameters that are expanded over the batch before they meet it: learned queries, class tokens, biases."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import PerSampleGrads, RefusedModelError, clip_per_sample
from psgrad.capture.row_by_row import is_row_by_row
from tests.model_oracle import assert_clipped, grads_one_by_one, squared_loss


class Attends(nn.Module):
    """Runs `use(self, h)` on `h [N, 5, 4]`; what it returns `[N, .., 4]` attends to h."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.inner = nn.Linear(3, 4)
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.positions = nn.Parameter(torch.randn(1, 2, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.bias = nn.Parameter(torch.randn(2, 5))
        self.to_query = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.embedding = nn.Embedding(2, 4)
        self.holder = Holder()
        self.register_buffer("constant", torch.randn(2, 4))

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        out = self.use(self, h)
        return out if out.ndim == 2 else F.scaled_dot_product_attention(self.to_query(out), h, h).mean(1)

    def expanded(self, h):
        return self.queries.expand(len(h), -1, -1)


class Holder(nn.Module):
    """Gives its queries away: nobody inside has met the batch."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(2, 4))

    def forward(self, samples):
        return self.latents.expand(samples, -1, -1)


class Beside(nn.Module):
    """Without parameters: whoever runs it, it is as if its caller did."""

    def forward(self, token, h):
        return F.gelu(torch.cat((token * 2, h), 1))[:, :2]


def heads_first(self, h):
    """Of as many samples as heads, 2, the bias looks as if it were expanded over the batch."""
    scores = h.unflatten(2, (2, 2)).permute(2, 0, 1, 3) + self.bias[:, None, None, :2].expand(2, 1, 5, 2)
    return scores.permute(1, 2, 0, 3).flatten(2)


def per_head(self, h):
    scores = h[:, None, :2, :1] + self.bias[:, :, None].expand(2, 5, 1)[:, :2]
    return scores.expand(-1, -1, -1, 4).flatten(1, 2)


def written_to(self, h):
    queries = self.expanded(h).clone()
    queries += self.positions
    return queries


BY_RULES = {
    "a layer": lambda self, h: self.norm(self.expanded(h)),
    "a frozen layer": lambda self, h: self.frozen(self.expanded(h)),
    "a function": lambda self, h: F.linear(self.expanded(h), self.to_query.weight, self.token[0, 0]),
    "repeated": lambda self, h: self.norm(self.queries.unsqueeze(0).repeat(len(h), 1, 1)),
    "plus positions": lambda self, h: self.norm(self.expanded(h) + self.positions),
    "both expanded": lambda self, h: self.norm(
        self.expanded(h) - self.positions.expand(len(h), -1, -1) / self.constant
    ),
    "scaled": lambda self, h: self.norm(2 * self.expanded(h) * 0.5 + self.constant),
    "plus a constant row": lambda self, h: self.norm(self.expanded(h) + self.constant[None]),
    "elementwise": lambda self, h: self.norm(F.dropout(F.gelu(self.expanded(h)).float().double(), 0.0)),
    "from zeros": lambda self, h: self.norm(torch.zeros_like(self.expanded(h)) + self.expanded(h)),
    "reshaped": lambda self, h: self.norm(
        self.expanded(h)
        .unsqueeze(1)
        .transpose(1, 2)
        .flatten(1)
        .reshape(len(h), 2, 4)
        .permute(0, 2, 1)
        .swapaxes(1, -1)
    ),
    "a part": lambda self, h: self.norm(self.expanded(h)[:, :1]),
    "pieces": lambda self, h: self.norm(self.expanded(h).chunk(2, dim=1)[1]),
    "weights of a mean": lambda self, h: self.expanded(h).softmax(-1) @ h[:, :4],
    "product with the batch": lambda self, h: torch.bmm(self.expanded(h) @ h.mT, h),
    "dot product": lambda self, h: F.scaled_dot_product_attention(self.expanded(h), h, h),
    "chosen": lambda self, h: torch.where(h[:, :2] > 0, self.expanded(h), h[:, :2]),
    "in a child": lambda self, h: Beside()(self.token.expand(len(h), -1, -1), h),
    "given away": lambda self, h: self.norm(self.holder(len(h))),
    "a child's weight": lambda self, h: self.norm(self.embedding.weight.expand(len(h), -1, -1)),
    "a mask of parameters": lambda self, h: F.scaled_dot_product_attention(h[:, :2], h, h, self.bias),
    "a computed mask": lambda self, h: F.scaled_dot_product_attention(
        h[:, None, :2], h[:, None], h[:, None], attn_mask=self.bias.tanh()[None, None]
    ).squeeze(1),
    "both": lambda self, h: F.scaled_dot_product_attention(self.expanded(h), h, h, self.bias),
    "returned": lambda self, h: h.mean(1) + self.queries[0].expand(len(h), 4),
}
ONE_BY_ONE = {
    "over the samples": lambda self, h: self.norm(self.expanded(h).softmax(0)),
    "moved": lambda self, h: self.norm(self.expanded(h).transpose(0, 1).contiguous().transpose(0, 1)),
    "turned round": lambda self, h: self.norm(self.expanded(h).flip(0)),
    "rows of several": lambda self, h: self.norm(self.expanded(h).reshape(-1, 4)).reshape(len(h), 2, 4),
    "written to": written_to,
    "plus what is made for one": lambda self, h: self.norm(self.expanded(h) + torch.ones(1, 2, 4).to(h)),
    "plus what is made": lambda self, h: self.norm(self.expanded(h) + torch.ones(len(h), 2, 4).to(h)),
}
BY_CHANCE = {"heads first": heads_first, "per head": per_head}
"""By rules, unless the first batch, or one that it is tried with, has as many rows as there are heads."""


def model_of(use):
    torch.manual_seed(0)
    return nn.Sequential(Attends(use), nn.Linear(4, 3)).double()


def assert_exact(model, x, rows_per_sample=1):
    """Norms and clipped sum are the oracle's; return the regions. Parameters that are not used are frozen."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(squared_loss(model, x), trainable, allow_unused=True)
    for p, grad in zip(trainable, grads, strict=True):
        p.requires_grad_(grad is not None)
    return assert_clipped(model, x, clip_per_sample, rows_per_sample)


# as many rows, or samples, as there are queries and heads, in the first and the last
@pytest.mark.parametrize(("rows", "rows_per_sample"), [(2, 1), (5, 1), (6, 2), (4, 2)])
@pytest.mark.parametrize("name", BY_RULES | ONE_BY_ONE | BY_CHANCE)
def test_exact(name, rows, rows_per_sample):
    x = torch.randn(rows, 5, 3, dtype=torch.double)
    model = model_of((BY_RULES | ONE_BY_ONE | BY_CHANCE)[name])
    regions = assert_exact(model, x, rows_per_sample)
    assert name in BY_CHANCE or (regions == []) == (name in BY_RULES), regions


@pytest.mark.parametrize("name", BY_CHANCE)
def test_a_later_batch_with_as_many_rows_as_heads(name):
    model = model_of(BY_CHANCE[name])
    for p in model[0].parameters():
        p.requires_grad_(p is model[0].bias or p is model[0].inner.weight)
    with PerSampleGrads(model) as handle:
        for rows in (9, 2, 9):
            x = torch.randn(rows, 5, 3, dtype=torch.double)
            expected = grads_one_by_one(model, squared_loss, [x])
            squared_loss(model, x).backward()
            for path, p in model.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(p.grad_sample, expected[path])
            assert rows == 2 or list(handle.regions) in ([], ["0"])


@pytest.mark.parametrize("name", ["a layer", "given away", "a computed mask", "product with the batch"])
def test_of_no_samples(name):
    model = model_of(BY_RULES[name])
    with PerSampleGrads(model) as handle:
        squared_loss(model, torch.randn(4, 5, 3, dtype=torch.double)).backward()
        model(torch.randn(0, 5, 3, dtype=torch.double)).sum().backward()
        assert handle.regions == {}
        assert model[0].inner.weight.grad_sample.shape == (0, 4, 3)


class Queried(nn.Module):
    """Its queries are a child's weight, which only it looks at, as in DETR; the child around has none."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()
        self.inner = nn.Linear(3, 4)

    def forward(self, x):
        h = self.inner(x)
        return self.decoder(self.decoder.positions.weight.unsqueeze(0).repeat(len(h), 1, 1), h)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(2, 4)
        self.to_query = nn.Linear(4, 4)

    def forward(self, queries, h):
        q = self.to_query(torch.zeros_like(queries) + queries)
        return F.scaled_dot_product_attention(q, h, h).mean(1)


def test_weights_of_a_child_as_queries():
    torch.manual_seed(0)
    model = nn.Sequential(Queried(), nn.Linear(4, 2)).double()
    assert assert_exact(model, torch.randn(6, 5, 3, dtype=torch.double)) == []


class Distances(nn.Module):
    """Every sample's to every sample's copy: no sample is in another's result, but its copy is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.prototype = nn.Parameter(torch.randn(4))
        self.given = None

    def forward(self, x):
        h = self.inner(x)
        copies = self.prototype.expand(len(h), 4)
        if self.given == "a layer":
            copies = self.inner(copies[:, :3])
        return h * torch.cdist(h, copies).mean(1, keepdim=True)


@pytest.mark.parametrize("given", [None, "a layer"])
def test_copies_of_other_samples_are_not_used(given):
    torch.manual_seed(0)
    model = nn.Sequential(Distances(), nn.Linear(4, 2)).double()
    model[0].given = given
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match="or mixed: which row is whose"):
        model(torch.randn(4, 3, dtype=torch.double))


T = torch.randn(3, 4, 2, 5)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda t: (torch.relu, t), True),
        (lambda t: (F.relu, t, {"inplace": True}), False),
        (lambda t: (torch.transpose, t, 1, -1), True),
        (lambda t: (torch.transpose, t, 1, -4), False),
        (lambda t: (torch.permute, t, (0, 3, 1, 2)), True),
        (lambda t: (torch.Tensor.permute, t, 0, -1, 1, 2), True),
        (lambda t: (torch.permute, t, (1, 0, 2, 3)), False),
        (lambda t: (torch.flatten, t), False),
        (lambda t: (torch.flatten, t, {"start_dim": 1}), True),
        (lambda t: (torch.unsqueeze, t, -5), False),
        (lambda t: (torch.unsqueeze, t, -4), True),
        (lambda t: (torch.squeeze, t), False),
        (lambda t: (torch.softmax, t, {"dim": -4}), False),
        (lambda t: (torch.softmax, t, -1), True),
        (lambda t: (torch.chunk, t, 2), False),
        (lambda t: (torch.chunk, t, 2, 1), True),
        (lambda t: (torch.reshape, t, (3, -1)), True),
        (lambda t: (torch.reshape, t, (-1, 40)), False),
        (lambda t: (torch.reshape, t, (4, -1)), False),
        (lambda t: (torch.Tensor.view, t, 3, 8, 5), True),
        (lambda t: (torch.Tensor.__getitem__, t, (slice(None), 1)), True),
        (lambda t: (torch.Tensor.__getitem__, t, slice(None)), True),
        (lambda t: (torch.Tensor.__getitem__, t, 1), False),
        (lambda t: (torch.Tensor.__getitem__, t, (slice(1), 1)), False),
        (lambda t: (torch.Tensor.__getitem__, t, (slice(None), [1, 2])), False),
        (lambda t: (torch.Tensor.__getitem__, t, (Ellipsis, 1)), False),
        (lambda t: (torch.sum, t, 1), False),
    ],
)
def test_row_by_row(call, expected):
    func, t, *args = call(T)
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    func(t.clone(), *args, **kwargs)  # which is a call that there is
    assert is_row_by_row(func, t, args, kwargs) is expected
