"""Train a CNN on real images with differential privacy: `python -m recipes.train_dp`.

Poisson sampling, per-sample clipping, Gaussian noise, PRV accounting, augmentation multiplicity (De et
al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale") and
averaged weights. Everything lands in the run's folder: metrics, a checkpoint, a picture.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from psgrad import PsgradError, clip_per_sample, keep_freed_memory
from psgrad.dp import (
    PrivateOptimizer,
    PRVAccountant,
    epsilon_spent,
    noise_generator,
    noise_multiplier_for,
)
from recipes.augment import random_affine
from recipes.config import Settings, from_command_line, from_table
from recipes.data import DataName, Images, load_images
from recipes.models import small_cnn
from recipes.runs import Interruptible, RunFolder, plot_privacy

DEFAULT = Path(__file__).parent.parent / "configs" / "train_dp.toml"
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class TrainDP(Settings):
    """Train a CNN with differential privacy."""

    data: DataName = "mnist5k"
    """Data set; "mnist5k" ships with a package, the others are torchvision's."""
    data_root: Path | None = None
    """torchvision's data folder."""
    download: bool = False
    """Let torchvision fetch what is missing in the data folder."""
    epsilon: Positive = 3.0
    """Privacy to spend over the whole run."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Chance that the epsilon does not hold; below 1 / (number of training images)."""
    max_grad_norm: Positive = 0.5
    """Norm that each image's gradient is clipped to."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Chance of each training image to be in a step's batch."""
    steps: Count = 150
    """Steps of the optimizer."""
    learning_rate: Positive = 1.0
    """Of SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    augmentations: Count = 4
    """Random variants of each image in a step, whose gradients are averaged before clipping."""
    rotate: Annotated[float, Field(ge=0)] = 10.0
    """Largest rotation of a variant, degrees."""
    shift: Annotated[float, Field(ge=0)] = 2.0
    """Largest shift of a variant, pixels."""
    stretch: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Largest relative scaling and shearing of a variant."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the weights' running average, which is what is tested and saved."""
    rows_at_once: Count = 2000
    """Rows (images times variants) per backward pass; a matter of memory only."""
    evaluate_every: Count = 10
    """Steps between tests, metrics and checkpoints."""
    seed: int | None = None
    """Of weights, batches and variants, never of the noise. Epsilon holds if nobody knows it: best none."""
    out: Path | None = None
    """The run's folder; runs/train_dp/<time> if not given."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Go on with the run in this folder, with the settings it was started with."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status."""
    settings = from_command_line(TrainDP, DEFAULT, argv)
    if settings.resume is None:
        train(settings, RunFolder(settings.out, "train_dp", resume=False), saved=None)
    else:
        folder = RunFolder(settings.resume, "train_dp", resume=True)
        saved = folder.load()
        train(from_table(TrainDP, saved["settings"], str(folder.checkpoint)), folder, saved)
    return 0


def train(settings: TrainDP, folder: RunFolder, saved: dict[str, Any] | None) -> None:
    """Train, from the beginning or from a saved state, and report."""
    started = time.monotonic()
    images = load_images(settings.data, settings.data_root, settings.download)
    folder.make()
    count = len(images.train_x)

    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    model = small_cnn(*images.shape, images.classes)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))

    # One sample is all the variants of one image: they are clipped together.
    clip = clip_per_sample(model, settings.max_grad_norm, "sum", rows_per_sample=settings.augmentations)
    sigma = noise_multiplier_for(
        settings.epsilon, settings.delta, sample_rate=settings.sample_rate, steps=settings.steps
    )
    accountant = PRVAccountant()
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum),
        clip,
        noise_multiplier=sigma,
        expected_batch_size=settings.sample_rate * count,
        accountant=accountant,
        sample_rate=settings.sample_rate,
    )
    choices = noise_generator(seed=settings.seed)  # of batches and variants
    step, seconds = 0, 0.0
    if saved is not None:
        step, seconds = saved["step"], saved["seconds"]
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        choices.set_state(saved["choices"])
    history = folder.history(step)
    batches = UniformWithReplacementSampler(
        num_samples=count, sample_rate=settings.sample_rate, generator=choices, steps=settings.steps - step
    )

    def save() -> None:
        folder.save(
            {
                "settings": settings.model_dump(mode="json"),
                "step": step,
                "seconds": seconds + time.monotonic() - started,
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "choices": choices.get_state(),
            }
        )

    print(f"{count} images, noise multiplier {sigma:.3f}, {settings.steps} steps; run folder {folder.path}")
    bar = tqdm(total=settings.steps, initial=step, desc="train", unit="step")
    with bar, Interruptible() as interrupt:
        for batch in batches:
            if interrupt.asked:
                break
            loss, clipped = backward(
                settings, images, torch.tensor(batch, dtype=torch.long), clip, model, choices
            )
            optimizer.step()
            averaged.update_parameters(model)
            step += 1
            bar.update()
            if step % settings.evaluate_every == 0 or step == settings.steps:
                line = {
                    "step": step,
                    "loss": loss,
                    "clipped": clipped,
                    "epsilon": epsilon_spent(accountant, settings.delta),
                    "accuracy": accuracy(averaged, images),
                    "accuracy_raw": accuracy(model, images),
                    "seconds": seconds + time.monotonic() - started,
                }
                history.append(line)
                folder.log(**line)
                save()
                bar.set_postfix(
                    loss=f"{loss:.3f}",
                    epsilon=f"{line['epsilon']:.2f}",
                    clipped=f"{clipped:.0%}",
                    refresh=False,
                )
    clip.remove()
    save()
    if history:
        plot_privacy(history, folder.path / "privacy.png", f"{settings.data}, delta = {settings.delta:g}")
    if step < settings.steps:
        print(f"interrupted after step {step}; go on with --resume {folder.path}")
    print(
        f"epsilon {epsilon_spent(accountant, settings.delta):.2f}, delta {settings.delta:g}, "
        f"test accuracy {accuracy(averaged, images):.2%}, {seconds + time.monotonic() - started:.0f} seconds"
    )


def backward(
    settings: TrainDP, images: Images, batch: Tensor, clip: Any, model: nn.Module, choices: torch.Generator
) -> tuple[float, float]:
    """Add a batch's clipped gradients to `.grad`; return its mean loss and clipped fraction, not private."""
    variants = settings.augmentations
    loss_sum, clipped = 0.0, 0
    for part in batch.split(max(1, settings.rows_at_once // variants)):
        x = images.train_x[part].repeat_interleave(variants, 0)
        x = random_affine(x, choices, degrees=settings.rotate, shift=settings.shift, stretch=settings.stretch)
        y = images.train_y[part].repeat_interleave(variants)
        loss = F.cross_entropy(model(x), y, reduction="sum") / variants
        loss.backward()
        loss_sum += loss.item()
        clipped += int(clip.result.clipped.sum())
    return loss_sum / max(1, len(batch)), clipped / max(1, len(batch))


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Fraction of the test images that are classified right."""
    parts = zip(images.test_x.split(2000), images.test_y.split(2000), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(images.test_y)


if __name__ == "__main__":
    keep_freed_memory()
    try:
        sys.exit(main())
    except PsgradError as error:
        sys.exit(f"error: {error}")
