"""Fit an ensemble of CNNs on real images at once: `python -m recipes.train_ensemble`.

Every member has its own seed, bootstrap sample and order of images, and is what it would be if fitted alone;
with `learning_rates` it also has a rate of its own, which makes the run a sweep. Everything lands in the
run's folder: metrics, a checkpoint, a reliability diagram.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from pydantic import Field
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset
from tqdm import tqdm

from psgrad import ConfigError, keep_freed_memory
from psgrad.ensemble import SGD, Ensemble, MemberLoader
from recipes.config import Count, Positive, from_command_line, from_table, run_recipe
from recipes.data import DataSettings, Images, load_images
from recipes.ensemble_report import plot_reliability, scores
from recipes.models import small_cnn
from recipes.runs import Interruptible, RunFolder

DEFAULT = Path(__file__).parent.parent / "configs" / "train_ensemble.toml"
LOOP_STEPS = 3
"""Steps of the members alone, one after the other, that tell what a loop would take."""


class TrainEnsemble(DataSettings):
    """Fit an ensemble of CNNs at once."""

    members: Count = 16
    """K, models to fit."""
    bootstrap: bool = True
    """Give every member a bootstrap sample of the training images, or all of them in its own order."""
    batch_size: Count = 32
    """Images of a step, for each member."""
    epochs: Count = 3
    """Times that every member goes through its images."""
    learning_rate: Positive = 0.1
    """Of SGD; a cosine takes it to zero."""
    learning_rates: tuple[Positive, ...] = ()
    """One a member: a sweep, which says at the end which was best."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of SGD."""
    seed: int = 0
    """Of the first member; the next ones count on."""
    out: Path | None = None
    """The run's folder; runs/train_ensemble/<time> if not given."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Go on with the run in this folder, with the settings it was started with."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status."""
    settings = from_command_line(TrainEnsemble, DEFAULT, argv)
    if settings.resume is None:
        train(settings, RunFolder(settings.out, "train_ensemble", resume=False), saved=None)
    else:
        folder = RunFolder(settings.resume, "train_ensemble", resume=True)
        saved = folder.load()
        train(from_table(TrainEnsemble, saved["settings"], str(folder.checkpoint)), folder, saved)
    return 0


def train(settings: TrainEnsemble, folder: RunFolder, saved: dict[str, Any] | None) -> None:
    """Train, from the beginning or from a saved state, and report.

    Raises
    ------
    ConfigError
        If there are learning rates and not one a member.

    """
    rates = settings.learning_rates
    if rates and len(rates) != settings.members:
        raise ConfigError(
            f"learning_rates: {len(rates)} for {settings.members} members; one a member is needed"
        )
    images = load_images(settings.data, settings.data_root, settings.download)
    folder.make()
    run = Training(settings, images)
    if saved is not None:
        run.load_state_dict(saved)
    folder.history(run.steps_done)

    print(
        f"{settings.members} members, {len(images.train_x)} images, {run.steps} steps; "
        f"run folder {folder.path}"
    )
    bar = tqdm(total=run.steps, initial=run.steps_done, desc="train", unit="step")
    with bar, Interruptible() as interrupt:
        if saved is None:
            folder.save(run.state_dict())  # what there is to go on with if the first epoch is interrupted
        while run.epoch < settings.epochs and not interrupt.asked:
            started = time.monotonic()
            for x, y in run.loader:
                losses = step(run.ens, run.optimizer, x, y)
                run.schedule.step()
                bar.update()
                if interrupt.asked:
                    break
            else:
                run.epoch += 1
                run.seconds += time.monotonic() - started
                found, each = evaluate(probabilities(run.ens, images), images)
                line = {"step": run.steps_done, "epoch": run.epoch, "loss": float(losses.mean()), **found}
                folder.log(**line, accuracy_members=float(each.mean()), seconds=run.seconds)
                folder.save(run.state_dict())
                bar.set_postfix(
                    loss=f"{line['loss']:.3f}",
                    mean=f"{found['accuracy']:.1%}",
                    members=f"{each.mean():.1%}",
                )
    if run.epoch < settings.epochs:
        print(f"interrupted; epoch {run.epoch} is saved, go on with --resume {folder.path}")
    else:
        report(run, folder)


class Training:
    """Ensemble, optimizer, schedule and loader: what a checkpoint has, at the end of an epoch."""

    def __init__(self, settings: TrainEnsemble, images: Images) -> None:
        self.settings, self.images = settings, images
        self.epoch, self.seconds = 0, 0.0
        seeds = range(settings.seed, settings.seed + settings.members)
        self.ens = Ensemble.from_factory(lambda: small_cnn(*images.shape, images.classes), seeds)
        self.optimizer = SGD(
            self.ens.parameters(),
            lr=settings.learning_rates or settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        data = TensorDataset(images.train_x, images.train_y)
        self.loader = MemberLoader(data, settings.batch_size, seeds, bootstrap=settings.bootstrap)
        self.steps = settings.epochs * len(self.loader)
        self.schedule = CosineAnnealingLR(self.optimizer, self.steps)

    @property
    def steps_done(self) -> int:
        """Steps of whole epochs."""
        return self.epoch * len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run goes on from, its settings included."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "ensemble": self.ens.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]
        self.ens.load_state_dict(saved["ensemble"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.loader.load_state_dict(saved["loader"])


def step(ens: Ensemble, optimizer: SGD, x: Tensor, y: Tensor) -> Tensor:
    """Do one step of all members; their losses `[K]`."""
    optimizer.zero_grad()
    losses = ens.loss(F.cross_entropy, x, y, own=True)
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


def probabilities(ens: Ensemble, images: Images) -> Tensor:
    """`[K, N, classes]` of the test images."""
    return torch.cat([ens.predict(x).members for x in images.test_x.split(500)], 1)


def evaluate(members: Tensor, images: Images) -> tuple[dict[str, float], Tensor]:
    """Return what the mean of `[K, N, classes]` is worth on the test images; each member's accuracy `[K]`."""
    each = (members.argmax(2) == images.test_y).float().mean(1)
    return scores(members.mean(0), images.test_y), each


def report(run: Training, folder: RunFolder) -> None:
    """Print what came of it, and draw the reliability diagram."""
    settings, images = run.settings, run.images
    members = probabilities(run.ens, images)
    found, each = evaluate(members, images)
    plot_reliability(members, images.test_y, folder.path / "reliability.png", settings.data)
    if settings.learning_rates:
        for rate, accuracy in zip(settings.learning_rates, each.tolist(), strict=True):
            print(f"learning rate {rate:g}: test accuracy {accuracy:.2%}")
        best = int(each.argmax())
        print(f"best: learning rate {settings.learning_rates[best]:g}, member {best}")
    low, high = float(each.min()), float(each.max())
    print(f"test accuracy of the mean {found['accuracy']:.2%}, of the members {low:.2%} to {high:.2%}")
    print(f"NLL {found['nll']:.4f}, ECE {found['ece']:.4f}, Brier {found['brier']:.4f}")
    seconds, loop = run.seconds, loop_seconds(settings, run.ens, run.loader) * run.steps
    print(f"{seconds:.0f} seconds; one member after the other: about {loop:.0f} ({loop / seconds:.2f}x)")


def loop_seconds(settings: TrainEnsemble, ens: Ensemble, loader: MemberLoader) -> float:
    """Seconds of a step of plain PyTorch for every member, one after the other, data loading left out."""
    models = [ens.member(k) for k in range(settings.members)]
    optimizers = [
        torch.optim.SGD(model.parameters(), 1e-6, settings.momentum, weight_decay=settings.weight_decay)
        for model in models
    ]
    batches = [batch for batch, _ in zip(loader, range(LOOP_STEPS + 1), strict=False)]
    started = time.monotonic()
    for i, (x, y) in enumerate(batches):
        if i == 1:  # the first one warms up
            started = time.monotonic()
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[k]), y[k]).backward()
            optimizer.step()
    return (time.monotonic() - started) / max(1, len(batches) - 1)


if __name__ == "__main__":
    keep_freed_memory()
    run_recipe(main)
