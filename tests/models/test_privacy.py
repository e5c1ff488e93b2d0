"""P1, P2 and P5 on every family's small member: one sample's share in the clipped sum is bounded."""

import pytest
import torch

from psgrad import clip_per_sample
from psgrad.bench.zoo import classification_loss
from psgrad.dp import PrivateOptimizer, PRVAccountant
from tests.models.tiny import TINY, make_tiny

STYLES = {"flat": {}, "flat, two passes": {"memory_budget": 1}}
"""Arguments of `clip_per_sample` by clipping style and how it is computed."""

IN_TWO_PASSES = ("convnext", "densenet, checkpointed", "googlenet", "resnet, basic blocks", "swin_v2")
"""Models that are quickly run with backward in two passes as well; the others are slow tests."""

SAMPLES = 3


def is_slow(name, style):
    # the one with 24 million parameters is made of what the others are made of
    return name == "inception" or ("two passes" in style and name not in IN_TWO_PASSES)


every_model = pytest.mark.parametrize(
    ("name", "style"),
    [
        pytest.param(name, style, marks=pytest.mark.slow if is_slow(name, style) else ())
        for name in TINY
        for style in STYLES
    ],
)


def clipped_sum(model, clip, batch, reduction, split=SAMPLES):
    """The sum of clipped gradients, float64, and the norms before clipping."""
    model.zero_grad()
    norms = []
    images, labels = batch
    for part in zip(images.split(split), labels.split(split), strict=True):
        scale = 1 if reduction == "mean" else len(part[0])
        (scale * classification_loss(model, *part)).backward()
        norms.append(clip.result.norms)
    total = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    return total * (len(images) if reduction == "mean" else 1), torch.cat(norms)


def without(batch, n):
    return tuple(torch.cat([t[:n], t[n + 1 :]]) for t in batch)


@every_model
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_p1_one_sample_changes_the_sum_by_its_clipped_norm(name, reduction, style):
    model, *batch = make_tiny(name, SAMPLES)
    batch[0][0] *= 30  # an image out of range, as an adversary would bring
    with clip_per_sample(model, 1e-3, reduction, **STYLES[style]) as clip:
        _, norms = clipped_sum(model, clip, batch, reduction)
    # all are clipped, or one is not
    bound = norms.min().item() / 100 if reduction == "sum" else norms.median().item()
    with clip_per_sample(model, bound, reduction, **STYLES[style]) as clip:
        whole, norms = clipped_sum(model, clip, batch, reduction)
        for n in (0, SAMPLES - 1):
            rest, _ = clipped_sum(model, clip, without(batch, n), reduction)
            change = (whole - rest).norm().item()
            assert change <= clip.result.l2_bound * (1 + 1e-5)
            if style.startswith("flat"):  # and it is no less than it must be
                assert change == pytest.approx(min(bound, norms[n].item()), rel=1e-5)


@every_model
def test_p1_alone_in_single_precision_and_over_physical_batches(name, style):
    model, *batch = make_tiny(name, SAMPLES, torch.float)
    with clip_per_sample(model, 1e-2, "sum", **STYLES[style]) as clip:
        alone, _ = clipped_sum(model, clip, [t[:1] for t in batch], "sum")
        assert alone.norm() <= clip.result.l2_bound * (1 + 1e-5)
        rows, _ = clipped_sum(model, clip, batch, "sum", split=1)
        assert rows.norm() <= SAMPLES * clip.result.l2_bound * (1 + 1e-5)
    model, *batch = make_tiny(name, SAMPLES)
    with clip_per_sample(model, 1e-2, "sum", **STYLES[style]) as clip:
        whole, norms = clipped_sum(model, clip, batch, "sum")
        parts, norms_of_parts = clipped_sum(model, clip, batch, "sum", split=2)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(norms_of_parts, norms)


@every_model
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_p2_a_sample_that_is_not_finite_adds_nothing_and_is_reported(name, bad, style):
    model, *batch = make_tiny(name, SAMPLES)
    with clip_per_sample(model, 1e-2, "sum", **STYLES[style]) as clip:
        healthy, _ = clipped_sum(model, clip, without(batch, 1), "sum")
        batch[0][1, 0, 5, 5] = bad
        total, _ = clipped_sum(model, clip, batch, "sum")
        assert clip.result.non_finite.tolist() == [False, True, False]
    torch.testing.assert_close(total, healthy)


@every_model
def test_p5_the_divisor_is_the_expected_batch_size_whatever_was_drawn(name, style):
    model, *batch = make_tiny(name, SAMPLES)
    batch[0][-1] = torch.nan  # the additional sample, which contributes nothing
    start = [p.detach().clone() for p in model.parameters()]
    moves = []
    with clip_per_sample(model, 1e-2, "sum", **STYLES[style]) as clip:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            clip,
            noise_multiplier=0.0,
            expected_batch_size=5,
            accountant=PRVAccountant(),
            sample_rate=0.1,
        )
        for drawn in (SAMPLES - 1, SAMPLES):
            part = [t[:drawn] for t in batch]
            expected, _ = clipped_sum(model, clip, part, "sum")
            optimizer.step()
            moves.append(
                torch.cat([(s - p).flatten() for s, p in zip(start, model.parameters(), strict=True)])
            )
            torch.testing.assert_close(moves[-1], expected / 5)
            with torch.no_grad():
                for p, value in zip(model.parameters(), start, strict=True):
                    p.copy_(value)
    torch.testing.assert_close(moves[0], moves[1])
