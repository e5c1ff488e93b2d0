"""Clipping holds its gradients in memory that is the same in every step: no step may see another's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from psgrad import clip_per_sample
from psgrad.conv import reused
from tests.model_oracle import grads_one_by_one, squared_loss


@pytest.fixture(autouse=True)
def every_block_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused, "SMALLEST", 0)


def refuse(grad: torch.Tensor) -> None:
    raise ZeroDivisionError


def test_steps_of_other_batch_sizes_and_one_that_failed_are_each_right() -> None:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 3)).double()
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    for samples in (5, 6, 2, 7, 7, 1, 40, 5):
        x = torch.randn(samples, 2, 8, 8, dtype=torch.float64)
        expected = grads_one_by_one(model, squared_loss, (x,))
        with clip_per_sample(model, 0.05) as handle:
            for attempt in range(3):
                model.zero_grad()
                if attempt == 1:  # what it held is dropped half way
                    hidden = model[:2](x)
                    hidden.register_hook(refuse)
                    with pytest.raises(ZeroDivisionError):
                        model[2:](hidden).sum().backward()
                squared_loss(model, x).backward()
                for name, p in model.named_parameters():
                    right = torch.einsum("n,n...->...", handle.result.factors, expected[name]) / samples
                    torch.testing.assert_close(p.grad, right, rtol=1e-9, atol=1e-12)
                    given.append((p.grad, p.grad.clone()))
    assert all(torch.equal(grad, copy) for grad, copy in given)
