"""One small member of each torchvision family: exact, random modules live, refused where it mixes."""

import inspect

import pytest
import torch
from torchvision import models

from psgrad import PerSampleGrads, RefusedModelError, check_rows_independent, clip_per_sample
from psgrad.bench.zoo import classification_loss, model_names
from tests.model_oracle import grads_one_by_one
from tests.models.tiny import TINY, make_tiny


def test_every_family_has_a_small_member():
    families = {inspect.getmodule(models.get_model_builder(name)).__name__ for name in model_names()}
    assert families == {type(tiny.make()).__module__ for tiny in TINY.values()}


@pytest.mark.parametrize("name", TINY)
def test_per_sample_gradients(name):
    """Dropout and stochastic depth in eval mode: one by one they would draw other numbers."""
    model, images, labels = make_tiny(name)
    expected = grads_one_by_one(model, classification_loss, [images, labels])
    with PerSampleGrads(model):
        classification_loss(model, images, labels).backward()
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    seen = 0
    for path, p in model.named_parameters():
        error = (p.grad_sample - expected[path]).norm()
        # what a later normalisation takes out again has a gradient of roundoff, at the scale of the whole
        assert error <= 1e-8 * expected[path].norm() + 1e-13 * scale, path
        seen += bool(expected[path].norm() > 1e-6 * scale)
    assert seen > 0.9 * len(expected), "most gradients are zero: this compares nothing"


@pytest.mark.parametrize("name", TINY)
def test_a_training_step(name):
    """Everything random is on: with the same seed, unclipped gradients are those of an ordinary step."""
    model, images, labels = make_tiny(name, random=True)
    torch.manual_seed(1)
    classification_loss(model, images, labels).backward()
    ordinary = {path: p.grad.clone() for path, p in model.named_parameters()}
    model.zero_grad()
    with clip_per_sample(model, float("inf")) as clip:
        torch.manual_seed(1)
        classification_loss(model, images, labels).backward()
    assert clip.result.norms.isfinite().all()
    scale = torch.stack([g.norm() for g in ordinary.values()]).norm()
    for path, p in model.named_parameters():
        assert (p.grad - ordinary[path]).norm() <= 1e-8 * ordinary[path].norm() + 1e-13 * scale, path


@pytest.mark.parametrize("name", TINY)
def test_samples_stay_apart(name):
    model, images, _ = make_tiny(name, samples=2, dtype=torch.float, random=True)
    check_rows_independent(model, images)


@pytest.mark.parametrize("name", ["densenet", "resnet, basic blocks", "maxvit"])
def test_batch_norm_left_in_is_refused(name):
    model = TINY[name].make()
    images = torch.randn(3, 3, TINY[name].size, TINY[name].size)
    with pytest.raises(RefusedModelError, match="BatchNorm2d"):
        clip_per_sample(model, 1.0)
    with pytest.raises(RefusedModelError, match="BatchNorm2d"):
        check_rows_independent(model, images)
