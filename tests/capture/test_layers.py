"""Opacus's layers, shared and repeated modules, checkpoints, compiled submodules, dropout, autocast."""

import weakref

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, PerSampleGrads, clip_per_sample
from tests.capture.unknown import product
from tests.model_oracle import grads_one_by_one, squared_loss


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, **options)
        self.batch_first = options.get("batch_first", False)
        self.head = nn.Linear(4 * (1 + options.get("bidirectional", False)), 2)

    def forward(self, x):
        out, _ = self.rnn(x if self.batch_first else x.transpose(0, 1))
        return self.head(out.sum(1 if self.batch_first else 0))


class OpacusAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2, **options)
        self.embed = nn.Linear(3, 4)

    def forward(self, x):
        q = self.embed(x).transpose(0, 1)
        return self.attention(q, q, q)[0].transpose(0, 1)


class Shared(nn.Module):
    """One block at two places, called in turn, one of its layers under a second name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3))
        self.second = self.first
        self.again = self.first[0]
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.again(self.second(self.first(x)) * self.scale) * self.scale


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.ReLU(inplace=True))
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)


class Scaled(nn.Module):
    """A parameter of its own around what it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.inner(x * self.scale)


class Apart(Scaled):
    """A region: of this use of the parameter nobody knows that it keeps samples apart."""

    def forward(self, x):
        return self.inner(product(x, self.scale.exp().diag()))


class CheckpointedRegion(nn.Module):
    """A region, run again in backward as a whole."""

    def __init__(self):
        super().__init__()
        self.region = Apart(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    def forward(self, x):
        return checkpoint(self.region, x, use_reentrant=False)


MODELS = {
    "lstm": lambda: Recurrent(DPLSTM, batch_first=True),
    "lstm, sequence first": lambda: Recurrent(DPLSTM),
    "lstm, two ways and layers": lambda: Recurrent(
        DPLSTM, batch_first=True, bidirectional=True, num_layers=2
    ),
    "gru": lambda: Recurrent(DPGRU, batch_first=True),
    "rnn": lambda: Recurrent(DPRNN, batch_first=True),
    "opacus attention": OpacusAttention,
    "opacus attention with bias_kv": lambda: OpacusAttention(add_bias_kv=True, add_zero_attn=True),
    "shared": Shared,
    "checkpointed": Checkpointed,
    "checkpointed region": CheckpointedRegion,
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().double(), torch.randn(6, 5, 3, dtype=torch.double)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows_per_sample", [1, 2])
def test_every_parameter_of_every_model(name, rows_per_sample):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    with PerSampleGrads(model, rows_per_sample=rows_per_sample):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path], msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_clipped_sum_of_every_model(name):
    model, x = make(name)
    expected = grads_one_by_one(model, squared_loss, [x])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    factors = (norms.median() / norms).clamp(max=1)
    with clip_per_sample(model, norms.median().item(), "sum") as clip:
        (squared_loss(model, x) * len(x)).backward()
    torch.testing.assert_close(clip.result.norms, norms)
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad, torch.tensordot(factors, expected[path], 1))


def test_reentrant_checkpoint_is_refused():
    model = Checkpointed(reentrant=True).double()
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"block.*use_reentrant=False"):
        squared_loss(model, torch.randn(2, 5, 3, dtype=torch.double)).backward()


def test_a_checkpoint_around_the_model_from_the_first_batch_on():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        squared_loss(lambda x: checkpoint(model, x, use_reentrant=False), x).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name])


def test_checkpoint_inside_of_a_region_is_a_clear_error():
    model = Apart(Checkpointed()).double()
    with PerSampleGrads(model), pytest.raises(CaptureError, match="checkpoint"):
        squared_loss(model, torch.randn(2, 5, 3, dtype=torch.double)).backward()


def test_a_checkpoint_frees_what_layers_would_hold():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    x = torch.randn(4, 8)

    def alive(run):
        """How many of the layers' outputs are still in memory before backward."""
        storages = []
        hooks = [
            layer.register_forward_hook(
                lambda _layer, _x, out: storages.append(weakref.ref(out.untyped_storage()))
            )
            for layer in model
        ]
        out = run(x).sum()
        count = sum(storage() is not None for storage in storages)
        for hook in hooks:
            hook.remove()
        out.backward()
        return count

    with PerSampleGrads(model, "sum"):
        assert alive(model) == 7  # the last output is only summed
        assert alive(lambda x: checkpoint(model, x, use_reentrant=False)) == 0


@pytest.mark.parametrize("rows_per_sample", [1, 2])
def test_dropout_scales_a_sample_as_the_forward_pass_did(rows_per_sample):
    model = Scaled(nn.Dropout(0.5))
    x = torch.ones(100, 3)
    with PerSampleGrads(model, "sum", rows_per_sample=rows_per_sample):
        out = model(x)
        out.sum().backward()
    by_sample = (out / model.scale).unflatten(0, (-1, rows_per_sample)).sum(1)
    torch.testing.assert_close(model.scale.grad_sample, by_sample)
    assert by_sample.std(0).min() > 0.5


def test_autocast_in_a_region():
    torch.manual_seed(0)
    model = Apart(nn.TransformerEncoderLayer(3, 1, 8, dropout=0.0, batch_first=True))
    x = torch.randn(4, 5, 3)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = squared_loss(model, x)
        loss.backward()
    whole = sum((p.grad_sample - expected[path]).square().sum() for path, p in model.named_parameters())
    assert whole.sqrt() < 0.03 * sum(g.square().sum() for g in expected.values()).sqrt()
    assert all(p.grad_sample.dtype == torch.float32 for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [lambda block: block, Scaled])
def test_a_compiled_submodule(build):
    """What the compiler does with captured layers must not change a gradient."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = nn.Sequential(build(block), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.double)
    expected = grads_one_by_one(model, squared_loss, [x])
    if build is Scaled:
        model[0].inner = torch.compile(block, backend="eager")
    else:
        model[0] = torch.compile(block, backend="eager")
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    for (_, p), grads in zip(model.named_parameters(), expected.values(), strict=True):
        torch.testing.assert_close(p.grad_sample, grads)
