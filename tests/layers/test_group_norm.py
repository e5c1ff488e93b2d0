"""GroupNorm computes the gradient of its input itself: it is autograd's, and the parameters' the loop's."""

import pytest
import torch
from torch import nn

from psgrad import PerSampleGrads
from tests.model_oracle import grads_one_by_one, squared_loss

SIZES = [(), (1, 1), (3,), (2, 3), (1, 7), (2, 4), (5, 3, 2)]  # from 2 to 7 positions are few
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "a part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


class AroundNorm(nn.Module):
    """The input of the norm requires grad, and what follows writes to its output in place."""

    def __init__(self, groups):
        super().__init__()
        self.scale = nn.Linear(1, 6)
        self.norm = nn.GroupNorm(groups, 6)

    def forward(self, x):
        x = x * self.scale.weight.view(1, 6, *[1] * (x.ndim - 2)) if x.ndim > 2 else x * self.scale.weight.T
        return self.norm(x).tanh_()


@pytest.mark.parametrize("rows_per_sample", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_gradients_of_input_and_parameters(groups, layout, size, rows_per_sample):
    if groups == 6 and size in ((), (1, 1)):
        groups = 2  # torch refuses one sample's groups of one value
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 6, dtype=torch.double)
    nn.init.normal_(norm.weight)
    x = LAYOUTS[layout](torch.randn(4, 6, *size, dtype=torch.double)).requires_grad_()
    g = LAYOUTS[layout](torch.randn(4, 6, *size, dtype=torch.double))
    out = norm(x)
    (expected,) = torch.autograd.grad((out * g).sum(), x)
    with PerSampleGrads(norm, "sum", rows_per_sample=rows_per_sample):
        ours = norm(x)
        torch.testing.assert_close(ours, out)
        (ours * g).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)
    for path, grads in grads_one_by_one(
        norm, lambda m, x, g: (m(x) * g).sum(), [x.detach(), g], rows_per_sample
    ).items():
        torch.testing.assert_close(norm.get_parameter(path).grad_sample, grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [[], ["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("size", [(4, 4), (2, 2)])
def test_frozen_parts_and_in_place_operations_around(frozen, size):
    torch.manual_seed(0)
    model = AroundNorm(2).double()
    for name in frozen:
        model.norm.get_parameter(name).requires_grad_(False)
    model.scale.bias.requires_grad_(False)
    x = torch.randn(3, 6, *size, dtype=torch.double)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad_sample, expected[path], rtol=1e-10, atol=1e-10)


def test_a_weight_that_changes_before_backward_is_noticed():
    norm = nn.GroupNorm(2, 4)
    with PerSampleGrads(norm):
        loss = norm(torch.randn(2, 4, 3)).square().mean()
        with torch.no_grad():
            norm.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples(samples):
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(samples, 4, 3, requires_grad=True)
    with PerSampleGrads(norm, "sum"):
        norm(x).sum().backward()
    assert norm.weight.grad_sample.shape == (samples, 4)
    assert x.grad.shape == x.shape
