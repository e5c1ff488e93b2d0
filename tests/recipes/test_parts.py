"""The model, the augmentation and the run's folder."""

import pytest
import torch

from psgrad import ConfigError, clip_per_sample
from recipes.augment import random_affine
from recipes.models import small_cnn
from recipes.runs import RunFolder, writable


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 20, 20)])
def test_the_model_fits_every_data_set_and_can_be_clipped(shape):
    model = small_cnn(*shape, classes=10)
    with clip_per_sample(model, 1.0, "sum") as clip:
        model(torch.randn(3, *shape)).logsumexp(1).sum().backward()
    assert clip.result.norms.shape == (3,)


def test_the_model_has_the_size_its_docstring_says():
    assert sum(p.numel() for p in small_cnn(1, 28, 28, 10).parameters()) == 26_010
    assert "26,010" in small_cnn.__doc__


def test_no_augmentation_is_the_identity():
    images = torch.rand(4, 3, 9, 7)
    same = random_affine(images, torch.Generator(), degrees=0, shift=0, stretch=0)
    torch.testing.assert_close(same, images)


def test_every_row_is_augmented_on_its_own_and_the_generator_decides():
    images = torch.rand(1, 1, 12, 12).expand(6, 1, 12, 12)

    def variants(seed):
        generator = torch.Generator().manual_seed(seed)
        return random_affine(images, generator, degrees=20, shift=2, stretch=0.2)

    first = variants(0)
    assert len({tuple(row.flatten().tolist()) for row in first}) == 6
    assert torch.equal(first, variants(0))
    assert not torch.equal(first, variants(1))


def test_a_shift_is_in_pixels():
    images = torch.zeros(200, 1, 21, 21)
    images[:, :, 10, 10] = 1
    moved = random_affine(images, torch.Generator().manual_seed(0), degrees=0, shift=3, stretch=0)
    columns = (moved.sum((1, 2)) * torch.arange(21)).sum(1) / moved.sum((1, 2, 3)) - 10
    assert 2.5 < columns.abs().max() <= 3.01


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half written")
    with pytest.raises(ConfigError, match=r"checkpoint\.pt cannot be read"):
        RunFolder(tmp_path, "train_dp", resume=True).load()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    assert writable(tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"nothing can be written to .*file"):
        RunFolder(tmp_path / "file", "train_dp").make()


@pytest.mark.parametrize("resume", [None, False])
def test_a_run_in_the_folder_can_be_resumed_where_the_recipe_has_that(tmp_path, resume):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ConfigError, match="holds a run already: choose another --out") as refused:
        RunFolder(tmp_path, "any", resume=resume)
    assert ("--resume" in str(refused.value)) == (resume is not None)


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path):
    folder = RunFolder(tmp_path, "train_dp")
    for step in (1, 2, 3):
        folder.log(step=step, loss=0.5)
    assert [line["step"] for line in folder.history(up_to_step=2)] == [1, 2]
    assert folder.metrics.read_text().count("\n") == 2
