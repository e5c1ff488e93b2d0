"""The batch is axis 1 of what a module gets, and axis 0 of what comes beside."""

import pytest
import torch
from torch import nn

from psgrad import PerSampleGrads


class TimeFirst(nn.Module):
    """Attention over time first, with a mask that has the batch first."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x, mask):
        x = x.transpose(0, 1)
        x, _ = self.attention(x, x, x, key_padding_mask=mask)
        return self.head(x.transpose(0, 1)).mean(1)


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
def test_a_mask_with_the_batch_first_of_what_has_the_time_first(samples, times):
    torch.manual_seed(0)
    model = TimeFirst().double()
    x = torch.randn(samples, times, 8, dtype=torch.double)
    mask = torch.arange(times)[None] >= torch.randint(1, times + 1, (samples, 1))
    expected = []
    for n in range(samples):
        loss = model(x[n : n + 1], mask[n : n + 1]).square().sum()
        expected.append(torch.autograd.grad(loss, list(model.parameters())))
    with PerSampleGrads(model, "sum"):
        model(x, mask).square().sum().backward()
    for p, grads in zip(model.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(grads))
