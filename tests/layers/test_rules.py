"""Every layer with a rule against the one-by-one loop, all three verbs."""

import pytest
import torch
from torch import nn

from psgrad import GradNorms, PerSampleGrads, clip_per_sample
from psgrad.layers import NAMED_RULES, RULES, rule_for
from tests.model_oracle import grads_one_by_one, squared_loss


def eval_batch_norm(make):
    def build():
        layer = make().eval()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        return layer

    return build


def eval_instance_norm():
    layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval()
    layer.running_mean.normal_()
    return layer


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 has it."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


CASES = [
    (nn.Conv1d, lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), (4, 9)),
    (nn.Conv1d, lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2, bias=False), (2, 9)),
    (nn.Conv2d, lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6)),
    (nn.Conv2d, lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), groups=4), (4, 7, 6)),
    (nn.Conv2d, lambda: nn.Conv2d(3, 5, 1), (3, 5, 5)),
    (nn.Conv2d, lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 5)),
    (nn.Conv2d, lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect", stride=2), (3, 6, 5)),
    (nn.Conv2d, lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="replicate"), (3, 6, 5)),
    (nn.Conv3d, lambda: nn.Conv3d(2, 3, 2, dilation=(1, 2, 1)), (2, 4, 5, 3)),
    (nn.ConvTranspose1d, lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5)),
    (nn.ConvTranspose2d, lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 4, 5)),
    (nn.ConvTranspose3d, lambda: nn.ConvTranspose3d(2, 2, 2, dilation=3, output_padding=2), (2, 2, 3, 2)),
    (nn.Linear, lambda: nn.Linear(5, 3), (5,)),
    (nn.Linear, lambda: nn.Linear(5, 3, bias=False), (4, 2, 5)),
    (nn.Linear, lambda: nn.Linear(9, 8), (3, 9)),  # few positions: norms by Gram matrices
    (Conv1D, lambda: Conv1D(3, 5), (5,)),
    (Conv1D, lambda: Conv1D(3, 5), (4, 2, 5)),
    (Conv1D, lambda: Conv1D(8, 9), (3, 9)),
    (nn.GroupNorm, lambda: nn.GroupNorm(2, 4), (4, 5, 3)),
    (nn.GroupNorm, lambda: nn.GroupNorm(2, 4), (4, 2, 3)),
    (nn.GroupNorm, lambda: nn.GroupNorm(2, 4), (4,)),
    (nn.InstanceNorm1d, lambda: nn.InstanceNorm1d(3, affine=True), (3, 6)),
    (nn.InstanceNorm2d, lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
    (nn.InstanceNorm2d, eval_instance_norm, (3, 4, 5)),
    (nn.InstanceNorm3d, lambda: nn.InstanceNorm3d(3, affine=True), (3, 2, 3, 2)),
    (nn.LayerNorm, lambda: nn.LayerNorm((4, 3)), (2, 4, 3)),
    (nn.LayerNorm, lambda: nn.LayerNorm(6, bias=False), (6,)),
    (nn.RMSNorm, lambda: nn.RMSNorm((5,)), (3, 5)),
    (nn.RMSNorm, lambda: nn.RMSNorm((5,), eps=0.1), (5,)),
    (nn.BatchNorm1d, eval_batch_norm(lambda: nn.BatchNorm1d(4)), (4,)),
    (nn.BatchNorm2d, eval_batch_norm(lambda: nn.BatchNorm2d(4)), (4, 3, 3)),
    (nn.BatchNorm3d, eval_batch_norm(lambda: nn.BatchNorm3d(2)), (2, 2, 3, 2)),
    (nn.Embedding, lambda: nn.Embedding(7, 3), "words"),
    (nn.Embedding, lambda: nn.Embedding(7, 3, padding_idx=2), "words"),
]


def test_the_table_of_cases_is_complete():
    kinds = {kind for kind, _, _ in CASES}
    assert {kind for kind in kinds if kind is not Conv1D} == set(RULES)
    assert {f"{Conv1D.__module__}.{Conv1D.__qualname__}"} == set(NAMED_RULES)


def batch(shape, rows):
    if shape == "words":
        return torch.randint(7, (rows, 5))
    return torch.randn(rows, *shape, dtype=torch.double)


@pytest.fixture(params=range(len(CASES)), ids=lambda i: f"{CASES[i][0].__name__}-{i}")
def case(request):
    torch.manual_seed(request.param)
    _, make, shape = CASES[request.param]
    layer = make().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    assert rule_for(layer) is not None
    return layer, shape


@pytest.mark.parametrize(("samples", "rows_per_sample"), [(3, 1), (2, 3), (1, 1)])
def test_grads_are_those_of_the_loop(case, samples, rows_per_sample):
    layer, shape = case
    x = batch(shape, samples * rows_per_sample)
    expected = grads_one_by_one(layer, squared_loss, [x], rows_per_sample)
    ordinary = grads_one_by_one(layer, squared_loss, [x], len(x))
    with PerSampleGrads(layer, rows_per_sample=rows_per_sample):
        squared_loss(layer, x).backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name])
        torch.testing.assert_close(p.grad, ordinary[name][0])


@pytest.mark.parametrize(("samples", "rows_per_sample"), [(4, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize("held", ["written", "operands"])
def test_clipped_sum_is_that_of_the_loop(case, samples, rows_per_sample, held, monkeypatch):
    """Both forms that clipping may hold between norms and sum."""
    from psgrad.capture.contribution import KeptGrads, LayerUse

    def written(use):
        return KeptGrads(use.path, use.grads(), use.samples)

    monkeypatch.setattr(LayerUse, "kept", written if held == "written" else lambda use: use)
    layer, shape = case
    x = batch(shape, samples * rows_per_sample)
    expected = grads_one_by_one(layer, squared_loss, [x], rows_per_sample)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    max_norm = norms.median().item()
    factors = (max_norm / norms).clamp(max=1)
    with clip_per_sample(layer, max_norm, rows_per_sample=rows_per_sample) as clip:
        squared_loss(layer, x).backward()
    torch.testing.assert_close(clip.result.norms, norms)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, torch.tensordot(factors, expected[name], 1) / samples)


def test_only_wanted_parameters_are_computed():
    layer = nn.Conv2d(2, 3, 3).double()
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 2, 5, 5, dtype=torch.double)
    with PerSampleGrads(layer):
        squared_loss(layer, x).backward()
    assert layer.weight.grad is None
    assert not hasattr(layer.weight, "grad_sample")
    torch.testing.assert_close(layer.bias.grad_sample, grads_one_by_one(layer, squared_loss, [x])["bias"])


def test_empty_batch(case):
    layer, shape = case
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return  # torch itself has no instance norm of an empty batch
    x = batch(shape, 0)
    with PerSampleGrads(layer, "sum"):
        layer(x).sum().backward()
    for p in layer.parameters():
        assert p.grad_sample.shape == (0, *p.shape)
        assert not p.grad.any()


def test_subclass_with_its_own_forward_loses_the_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Plain(nn.Linear):
        pass

    assert rule_for(Doubled(2, 2)) is None
    assert rule_for(Plain(2, 2)) is rule_for(nn.Linear(2, 2))


def test_transposed_convolution_with_output_size():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=3).double()

    def loss_of(model, x):
        return model(x, output_size=[12, 13]).sin().flatten(1).sum(1).mean()

    x = torch.randn(3, 2, 4, 4, dtype=torch.double)
    expected = grads_one_by_one(layer, loss_of, [x])
    with PerSampleGrads(layer):
        loss_of(layer, x).backward()
    torch.testing.assert_close(layer.weight.grad_sample, expected["weight"])


def test_linear_norm_of_a_gradient_that_cancels():
    """Two positions whose gradients nearly cancel: the Gram sum has no digit left, the norm has."""
    layer = nn.Linear(64, 64)
    a, g = torch.randn(64), torch.randn(64)
    x = torch.stack([a, a * (1 + 2**-11)])[None]
    grad = torch.stack([g, -g])[None]
    with clip_per_sample(layer, torch.inf, "sum") as clip:
        layer(x).backward(grad)
    exact = grad.double()[0].T @ x.double()[0]
    torch.testing.assert_close(clip.result.norms.double(), exact.norm()[None], rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [lambda: nn.Linear(9, 8), lambda: Conv1D(8, 9)])
@pytest.mark.parametrize("samples", [1, 4])
def test_norms_and_the_ordinary_gradient_from_the_same_products(make, samples, monkeypatch):
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(samples, 60, 9, dtype=torch.double)
    for p in layer.parameters():
        nn.init.normal_(p)
    found = []
    rule = type(rule_for(layer))
    original = rule.norms_and_sums
    monkeypatch.setattr(rule, "norms_and_sums", lambda *a: found.append(original(*a)) or found[-1])
    expected = grads_one_by_one(layer, squared_loss, [x])
    with GradNorms(layer, "sum") as norms:
        (squared_loss(layer, x) * samples).backward()
    assert found[0] is not None
    squares = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0)
    torch.testing.assert_close(norms.norms, squares.sqrt())
    for path, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, expected[path].sum(0))
