"""`nn.MultiheadAttention` on the batch as a whole: to itself or others, with masks and with its weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import PerSampleGrads, clip_per_sample
from tests.model_oracle import assert_clipped, grads_one_by_one, squared_loss

CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
NO_WEIGHTS = {"need_weights": False}


def itself(h):
    return h, h, h


def others(h):
    return h[:, 1:3] * 2, h, h


def three(h):
    return h[:, :4].sin(), h.cos(), h


def left_out_keys(h):
    """Of another sample other ones, of none all."""
    return {"key_padding_mask": (h[..., 0] > 0) & (torch.arange(h.shape[1]) > 0)}


def added_to_keys(h):
    return {"key_padding_mask": h.detach()[..., 1]}


def of_samples_and_heads(h):
    scores = h.detach() @ h.detach().mT
    return {"attn_mask": torch.cat([scores.unsqueeze(1), -scores.unsqueeze(1)], 1).flatten(0, 1)}


def left_out_of_samples_and_heads(h):
    mask = of_samples_and_heads(h)["attn_mask"] > 0
    return {"attn_mask": mask & ~torch.eye(5, dtype=torch.bool)}


# of the layer, of its call, by the batch, inputs, whether it runs on the batch as a whole
CASES = {
    "plain": ({}, NO_WEIGHTS, None, itself, True),
    "without bias": ({"bias": False}, NO_WEIGHTS, None, itself, True),
    "left out": ({}, NO_WEIGHTS | {"attn_mask": CAUSAL}, None, itself, True),
    "added": ({}, NO_WEIGHTS | {"attn_mask": torch.randn(5, 5).double()}, None, itself, True),
    "weights": ({}, {}, None, itself, True),
    "every head's weights": ({}, {"average_attn_weights": False}, None, itself, True),
    "weights, left out": ({}, {"attn_mask": CAUSAL}, None, itself, True),
    "to others": ({}, NO_WEIGHTS, None, others, True),
    "to others, weights": ({}, {}, left_out_keys, others, True),
    "three inputs": ({}, NO_WEIGHTS, None, three, True),
    "three inputs, weights": ({"bias": False}, {}, added_to_keys, three, True),
    "keys left out": ({}, NO_WEIGHTS, left_out_keys, itself, True),
    "added to keys": ({}, NO_WEIGHTS, added_to_keys, itself, True),
    "both left out": ({}, NO_WEIGHTS | {"attn_mask": CAUSAL}, left_out_keys, itself, True),
    "both, weights": ({}, {"attn_mask": CAUSAL}, left_out_keys, itself, True),
    "causal, and keys left out": (
        {},
        NO_WEIGHTS | {"attn_mask": CAUSAL, "is_causal": True},
        left_out_keys,
        itself,
        True,
    ),
    "causal": ({}, NO_WEIGHTS | {"attn_mask": CAUSAL, "is_causal": True}, None, itself, True),
    "of samples and heads": ({}, NO_WEIGHTS, of_samples_and_heads, itself, True),
    "left out of samples and heads": ({}, {}, left_out_of_samples_and_heads, itself, True),
    "other widths": ({"kdim": 4, "vdim": 4, "embed_dim": 6}, NO_WEIGHTS, None, None, False),
    "more keys": ({"add_bias_kv": True}, NO_WEIGHTS, None, itself, False),
    "a key of zeros": ({"add_zero_attn": True}, NO_WEIGHTS, None, itself, False),
}


class Attends(nn.Module):
    def __init__(self, layer, call, masks, inputs, batch_first):
        super().__init__()
        options = {"embed_dim": 4, "num_heads": 2} | layer
        self.attention = nn.MultiheadAttention(batch_first=batch_first, **options)
        self.call, self.masks, self.inputs, self.batch_first = call, masks, inputs, batch_first
        self.wide = nn.Linear(4, options["embed_dim"])

    def forward(self, h):
        inputs = (self.wide(h), h, h) if self.inputs is None else self.inputs(h)
        if not self.batch_first:
            moved = {id(t): t.transpose(0, 1) for t in inputs}  # what was the same still is
            inputs = [moved[id(t)] for t in inputs]
        out, weights = self.attention(*inputs, **self.call, **(self.masks(h) if self.masks else {}))
        out = out if self.batch_first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)


def model_of(name, batch_first):
    layer, call, masks, inputs, known = CASES[name]
    torch.manual_seed(0)
    attends = Attends(layer, call, masks, inputs, batch_first)
    if inputs is not None:
        attends.wide.requires_grad_(False)
    return nn.Sequential(nn.Linear(3, 4), attends).double(), known


# as many rows as there are positions, and not
@pytest.mark.parametrize(("rows", "rows_per_sample"), [(5, 1), (6, 2)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_exact(name, batch_first, rows, rows_per_sample):
    model, known = model_of(name, batch_first)
    x = torch.randn(rows, 5, 3, dtype=torch.double)
    before = model(x)
    with PerSampleGrads(model):
        for _ in range(2):
            torch.testing.assert_close(model(x), before)
    regions = assert_clipped(model, x, clip_per_sample, rows_per_sample)
    assert (regions == []) is known


# PyTorch's own attention takes no empty batch with a mask, unless its weights are asked for
@pytest.mark.parametrize(
    ("name", "takes_none"),
    [
        ("both left out", False),
        ("to others, weights", True),
        ("of samples and heads", False),
        ("plain", True),
    ],
)
def test_one_sample_then_none_then_strided(name, takes_none):
    model, _ = model_of(name, batch_first=True)
    with PerSampleGrads(model) as handle:
        x = torch.randn(3, 5, 6, dtype=torch.double)[..., ::2]
        for batch in (x[:1], *([x[:0]] if takes_none else []), x):
            expected = grads_one_by_one(model, squared_loss, [batch]) if len(batch) else None
            out = model(batch)
            (squared_loss(model, batch) if len(batch) else out.sum()).backward()
            for path, p in model.named_parameters():
                if p.requires_grad and expected is not None:
                    torch.testing.assert_close(p.grad_sample, expected[path])
                elif p.requires_grad:
                    assert p.grad_sample.shape == (0, *p.shape)
        assert handle.regions == {}


@pytest.mark.parametrize("name", ["both left out", "weights, left out", "added to keys", "three inputs"])
def test_under_autocast(name):
    model, _ = model_of(name, batch_first=True)
    model, x = model.float(), torch.randn(6, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with PerSampleGrads(model) as handle:
            out = model(x)
            assert handle.regions == {}
            out.float().square().flatten(1).sum(1).mean().backward()
    torch.testing.assert_close(out.float(), before.float(), rtol=0.05, atol=0.05)
    assert all(p.grad_sample.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["weights", "plain"])
def test_dropout_is_drawn_as_without(name):
    layer, call, masks, inputs, _ = CASES[name]
    model = Attends(layer | {"dropout": 0.5}, call, masks, inputs, True).double().requires_grad_(False)
    model.attention.requires_grad_(True)
    x = torch.randn(6, 5, 4, dtype=torch.double)
    with PerSampleGrads(model) as handle:
        model(x).flatten(1).sum(1).mean().backward()
        torch.manual_seed(3)
        drawn = model(x)
        assert handle.regions == {}
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, model(x))
    assert not torch.equal(drawn, model(x))


class Translates(nn.Module):
    """`nn.Transformer` from the words to the words before them, some left out."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        missing = left_out_keys(x)["key_padding_mask"]
        causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        out = self.transformer(
            x,
            x[:, :3].sin(),
            tgt_mask=causal,
            src_key_padding_mask=missing,
            memory_key_padding_mask=missing,
            tgt_is_causal=True,
        )
        return self.last(out)


def test_a_transformer():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, dtype=torch.double)
    assert assert_clipped(Translates().double(), x, clip_per_sample) == []


def test_causal_attention_of_a_layer():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.double)

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, src_mask=mask, is_causal=True)

    x = torch.randn(4, 5, 4, dtype=torch.double)
    assert assert_clipped(Causal(), x, clip_per_sample) == []


class Queries(nn.Module):
    """Pools by attention with learned queries."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 2, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        pooled = self.attention(self.queries.repeat(len(x), 1, 1), x, x, need_weights=False)[0]
        return self.last(F.gelu(pooled).flatten(1))


@pytest.mark.parametrize("rows", [2, 6])
def test_learned_queries(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 5, 4, dtype=torch.double)
    assert assert_clipped(Queries().double(), x, clip_per_sample) == []


class ByFunction(nn.Module):
    """Calls the function itself, which takes masks of true and false as the layer does not pass them on."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12))
        self.out_weight, self.out_bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        h, maps = x.transpose(0, 1), (self.weight, self.bias)
        rest = None, None, False, 0.0, self.out_weight, self.out_bias
        masks = {"attn_mask": CAUSAL, **left_out_keys(x)}
        attend = F.multi_head_attention_forward
        return attend(h, h, h, 4, 2, *maps, *rest, need_weights=False, **masks)[0].transpose(0, 1)


def test_the_function_with_masks_of_true_and_false():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, dtype=torch.double)
    assert assert_clipped(nn.Sequential(ByFunction(), nn.Linear(4, 2)).double(), x, clip_per_sample) == []
