"""Train a CNN on real images with differential privacy: `python -m recipes.train_dp`.

Poisson sampling, per-sample clipping, Gaussian noise, PRV accounting, augmentation multiplicity (De et
al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale") and
averaged weights. Everything lands in the run's folder: metrics, a checkpoint, a picture.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from pydantic import Field
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from psgrad import clip_per_sample, keep_freed_memory
from psgrad.dp import (
    PrivateOptimizer,
    PRVAccountant,
    epsilon_spent,
    noise_generator,
    noise_multiplier_for,
)
from recipes.augment import random_affine
from recipes.config import Count, Positive, from_command_line, from_table, run_recipe
from recipes.data import DataSettings, Images, load_images
from recipes.models import accuracy, small_cnn
from recipes.pictures import plot_privacy
from recipes.runs import Interruptible, RunFolder

DEFAULT = Path(__file__).parent.parent / "configs" / "train_dp.toml"


class TrainDP(DataSettings):
    """Train a CNN with differential privacy."""

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
    run = Training(settings, images, started)
    if saved is not None:
        run.load_state_dict(saved)
    history = folder.history(run.step)

    sigma = run.optimizer.noise_multiplier
    print(
        f"{len(images.train_x)} images, noise multiplier {sigma:.3f}, {settings.steps} steps; "
        f"run folder {folder.path}"
    )
    bar = tqdm(total=settings.steps, initial=run.step, desc="train", unit="step")
    with bar, Interruptible() as interrupt:
        for batch in run.batches():
            if interrupt.asked:
                break
            loss, clipped = run.take_step(batch)
            bar.update()
            if run.step % settings.evaluate_every == 0 or run.step == settings.steps:
                line = {"step": run.step, "loss": loss, "clipped": clipped, **run.evaluate()}
                history.append(line)
                folder.log(**line)
                folder.save(run.state_dict())
                bar.set_postfix(
                    loss=f"{loss:.3f}",
                    epsilon=f"{line['epsilon']:.2f}",
                    clipped=f"{clipped:.0%}",
                    refresh=False,
                )
    run.clip.remove()
    folder.save(run.state_dict())
    if history:
        plot_privacy(history, folder.path / "privacy.png", f"{settings.data}, delta = {settings.delta:g}")
    if run.step < settings.steps:
        print(f"interrupted after step {run.step}; go on with --resume {folder.path}")
    found = run.evaluate()
    print(
        f"epsilon {found['epsilon']:.2f}, delta {settings.delta:g}, "
        f"test accuracy {found['accuracy']:.2%}, {found['seconds']:.0f} seconds"
    )


class Training:
    """Model, averaged weights, private optimizer, choice of batches and variants: what a checkpoint has."""

    def __init__(self, settings: TrainDP, images: Images, started: float) -> None:
        self.settings, self.images, self.started = settings, images, started
        self.step = 0
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        self.model = small_cnn(*images.shape, images.classes)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))

        # One sample is all the variants of one image: they are clipped together.
        self.clip = clip_per_sample(
            self.model, settings.max_grad_norm, "sum", rows_per_sample=settings.augmentations
        )
        self.accountant = PRVAccountant()
        self.optimizer = PrivateOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=settings.learning_rate, momentum=settings.momentum),
            self.clip,
            noise_multiplier=noise_multiplier_for(
                settings.epsilon, settings.delta, sample_rate=settings.sample_rate, steps=settings.steps
            ),
            expected_batch_size=settings.sample_rate * len(images.train_x),
            accountant=self.accountant,
            sample_rate=settings.sample_rate,
        )
        self.choices = noise_generator(seed=settings.seed)  # of batches and variants

    def batches(self) -> UniformWithReplacementSampler:
        """Return the Poisson-sampled batches of the steps that are left, as indices."""
        return UniformWithReplacementSampler(
            num_samples=len(self.images.train_x),
            sample_rate=self.settings.sample_rate,
            generator=self.choices,
            steps=self.settings.steps - self.step,
        )

    def take_step(self, batch: list[int]) -> tuple[float, float]:
        """Take a private step; return the batch's mean loss and clipped fraction, which are not private."""
        variants = self.settings.augmentations
        loss_sum, clipped = 0.0, 0
        indices = torch.tensor(batch, dtype=torch.long)
        for part in indices.split(max(1, self.settings.rows_at_once // variants)):
            y = self.images.train_y[part].repeat_interleave(variants)
            loss = F.cross_entropy(self.model(self.variants_of(part)), y, reduction="sum") / variants
            loss.backward()
            loss_sum += loss.item()
            clipped += int(self.clip.result.clipped.sum())
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return loss_sum / max(1, len(batch)), clipped / max(1, len(batch))

    def variants_of(self, indices: Tensor) -> Tensor:
        """Return random variants of images, those of one image in consecutive rows."""
        x = self.images.train_x[indices].repeat_interleave(self.settings.augmentations, 0)
        s = self.settings
        return random_affine(x, self.choices, degrees=s.rotate, shift=s.shift, stretch=s.stretch)

    def evaluate(self) -> dict[str, float]:
        """Return epsilon and the seconds so far, and the test accuracy of averaged and of last weights."""
        return {
            "epsilon": epsilon_spent(self.accountant, self.settings.delta),
            "accuracy": accuracy(self.averaged, self.images),
            "accuracy_raw": accuracy(self.model, self.images),
            "seconds": time.monotonic() - self.started,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run goes on from, its settings included."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "step": self.step,
            "seconds": time.monotonic() - self.started,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "choices": self.choices.get_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.step = saved["step"]
        self.started -= saved["seconds"]
        self.model.load_state_dict(saved["model"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.choices.set_state(saved["choices"])


if __name__ == "__main__":
    keep_freed_memory()
    run_recipe(main)
