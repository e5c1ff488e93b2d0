"""What takes the place of layers that mix samples."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import RefusedModelError, clip_per_sample
from psgrad.dp import PrivacyEngine


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it, by the same name: a network of timm is in `tests/models/test_other_libraries.py`."""

    def __init__(self, channels, act, **options):
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


@pytest.fixture(autouse=True)
def _a_copy_finds_the_class_by_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", sys.modules[__name__])


def network():
    block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), BatchNormAct2d(6, nn.SiLU(), eps=1e-3))
    head = nn.Flatten(), nn.Linear(96, 3)
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), block, *head)


def test_batch_norms_with_an_activation_inside_are_replaced_as_well():
    model = network().double()
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(RefusedModelError, match=r"(?s)1 \(.*replaces it.*2\.1 \(.*torch's layers and timm's"):
        clip_per_sample(model, 1.0)
    fixed = PrivacyEngine.get_compatible_module(model)
    assert type(model[2][1]) is BatchNormAct2d
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fixed.modules())
    h = fixed[:2](x)
    norm = fixed[2][1][0]
    assert (norm.num_groups, norm.eps, norm.weight.dtype) == (2, 1e-3, torch.double)
    torch.testing.assert_close(fixed[2](h), F.silu(F.group_norm(fixed[2][0](h), 2, eps=1e-3)))
    with clip_per_sample(fixed, 1.0) as clip:
        F.cross_entropy(fixed(x), y).backward()
    assert clip.result.norms.shape == (5,)


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer(8, 2), nn.LSTM(8, 3), nn.BatchNorm1d(8)])
@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_what_opacus_puts_in_keeps_its_dtype(layer, dtype):
    fixed = PrivacyEngine.get_compatible_module(nn.Sequential(layer, nn.Tanh()).to(dtype))
    assert type(fixed[0]) is not type(layer) or type(fixed[0].self_attn) is not nn.MultiheadAttention
    assert {p.dtype for p in fixed.parameters()} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_the_model_and_has_no_weights(training):
    fixed = PrivacyEngine.get_compatible_module(BatchNormAct2d(4, nn.ReLU(), affine=False).train(training))
    assert [type(layer) for layer in fixed] == [nn.GroupNorm, nn.Identity, nn.ReLU]
    assert fixed.training is fixed[0].training is training
    assert fixed[0].weight is None
