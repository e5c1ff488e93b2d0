"""Whether a loss is a mean or a sum, told by the loss itself or by calling it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import ConfigError, check_loss_reduction

LOGITS, CLASSES = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
FUNCTIONS = {
    "mean": [F.cross_entropy, lambda z, y: F.nll_loss(z, y), lambda z, y: F.cross_entropy(z, y) * 3],
    "sum": [lambda z, y: F.cross_entropy(z, y, reduction="sum"), lambda z, y: z.square().sum()],
}


@pytest.mark.parametrize("wanted", ["mean", "sum"])
@pytest.mark.parametrize("actual", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_a_loss_of_torch_says_it_itself(kind, actual, wanted):
    if actual == wanted:
        check_loss_reduction(kind(reduction=actual), wanted)
    else:
        with pytest.raises(ConfigError, match=f'loss_reduction="{actual}"'):
            check_loss_reduction(kind(reduction=actual), wanted)


@pytest.mark.parametrize("wanted", ["mean", "sum"])
@pytest.mark.parametrize(
    ("actual", "function"), [(name, function) for name, fs in FUNCTIONS.items() for function in fs]
)
def test_any_function_is_called(actual, function, wanted):
    if actual == wanted:
        check_loss_reduction(function, wanted, LOGITS, CLASSES)
    else:
        with pytest.raises(ConfigError, match=f"has reduction '{actual}'"):
            check_loss_reduction(function, wanted, LOGITS, CLASSES)


def test_what_is_no_reduction_or_cannot_be_told_is_an_error():
    with pytest.raises(ConfigError, match="'none'"):
        check_loss_reduction(nn.MSELoss(reduction="none"), "mean")
    with pytest.raises(ConfigError, match="'none'"):
        check_loss_reduction(lambda z: z.sum(1), "mean", LOGITS)
    with pytest.raises(ConfigError, match="example"):
        check_loss_reduction(F.cross_entropy, "mean")
    with pytest.raises(ConfigError, match="nothing follows"):
        check_loss_reduction(lambda z: z.sum(), "sum", torch.zeros(3, 1))
    with pytest.raises(ConfigError, match=r"1\.41 times"):
        check_loss_reduction(lambda z: z.norm(), "sum", LOGITS)
    with pytest.raises(ConfigError, match="mean"):
        check_loss_reduction(F.mse_loss, "average", LOGITS, LOGITS)


def test_class_weights_under_mean_mix_samples():
    weights = torch.tensor([1.0, 2.0, 3.0])
    check_loss_reduction(nn.CrossEntropyLoss(weights, reduction="sum"), "sum")
    with pytest.raises(ConfigError, match="samples mix"):
        check_loss_reduction(nn.CrossEntropyLoss(weights), "mean")
