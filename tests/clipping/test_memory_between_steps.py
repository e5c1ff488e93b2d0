"""Clipping holds its gradients in memory that is the same in every step: no step may see another's."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psgrad import clip_per_sample, held
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


def test_what_a_layer_held_is_gone_before_the_next_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[object]] = []
    alive: list[int] = []
    hold, sums = held.Held._hold, held.weighted_sums

    def seen(self: held.Held, contribution: held.Contribution) -> None:
        taken.append(weakref.ref(next(iter(contribution.tensors()))))
        hold(self, contribution)

    def counted(part: object, factors: object) -> object:
        alive.append(sum(ref() is not None for ref in taken))
        return sums(part, factors)

    monkeypatch.setattr(held.Held, "_hold", seen)
    monkeypatch.setattr(held, "weighted_sums", counted)
    linear = [layer for _ in range(3) for layer in (nn.Linear(192, 192), nn.Tanh())]
    model = nn.Sequential(nn.Flatten(), *linear, nn.Linear(192, 10))
    with clip_per_sample(model, 1.0):
        F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(10, (8,))).backward()
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("kept", [True, False])
def test_blocks_stay_only_where_freed_memory_does_not(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused, "freed_memory_is_kept", lambda: kept)
    blocks = reused.Blocks()
    like = torch.empty(0)
    places = []
    for _ in range(2):
        with blocks.lending():
            places.append(reused.borrowed((100,), like).untyped_storage())
        blocks.take_back()
    assert (places[0].data_ptr() == places[1].data_ptr()) == (not kept)
