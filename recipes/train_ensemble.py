"""Fit an ensemble of CNNs on real images at once: `python -m recipes.train_ensemble`.

Every member has its own seed, bootstrap sample and order of images, and is what it would be if fitted alone;
with `learning_rates` it also has a rate of its own, which makes the run a sweep. Everything lands in the
run's folder: metrics, a checkpoint, a reliability diagram.
"""

from __future__ import annotations

import sys
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

from psgrad import ConfigError, PsgradError, keep_freed_memory
from psgrad.ensemble import SGD, Ensemble, MemberLoader
from recipes.config import Settings, from_command_line, from_table
from recipes.data import DataName, Images, load_images
from recipes.ensemble_report import plot_reliability, scores
from recipes.models import small_cnn
from recipes.runs import Interruptible, RunFolder

DEFAULT = Path(__file__).parent.parent / "configs" / "train_ensemble.toml"
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
LOOP_STEPS = 3
"""Steps of the members alone, one after the other, that tell what a loop would take."""


class TrainEnsemble(Settings):
    """Fit an ensemble of CNNs at once."""

    data: DataName = "mnist5k"
    """Data set; "mnist5k" ships with a package, the others are torchvision's."""
    data_root: Path | None = None
    """torchvision's data folder."""
    download: bool = False
    """Let torchvision fetch what is missing in the data folder."""
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
    members, rates = settings.members, settings.learning_rates
    if rates and len(rates) != members:
        raise ConfigError(f"learning_rates: {len(rates)} for {members} members; one a member is needed")
    images = load_images(settings.data, settings.data_root, settings.download)
    folder.make()
    seeds = range(settings.seed, settings.seed + members)

    ens = Ensemble.from_factory(lambda: small_cnn(*images.shape, images.classes), seeds)
    optimizer = SGD(
        ens.parameters(),
        lr=rates or settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    loader = MemberLoader(
        TensorDataset(images.train_x, images.train_y),
        settings.batch_size,
        seeds,
        bootstrap=settings.bootstrap,
    )
    steps = settings.epochs * len(loader)
    schedule = CosineAnnealingLR(optimizer, steps)
    epoch, seconds = 0, 0.0
    if saved is not None:
        epoch, seconds = saved["epoch"], saved["seconds"]
        ens.load_state_dict(saved["ensemble"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        loader.load_state_dict(saved["loader"])
    folder.history(epoch * len(loader))

    def save() -> None:
        folder.save(
            {
                "settings": settings.model_dump(mode="json"),
                "epoch": epoch,
                "seconds": seconds,
                "ensemble": ens.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "loader": loader.state_dict(),
            }
        )

    print(f"{members} members, {len(images.train_x)} images, {steps} steps; run folder {folder.path}")
    bar = tqdm(total=steps, initial=epoch * len(loader), desc="train", unit="step")
    with bar, Interruptible() as interrupt:
        if saved is None:
            save()  # what there is to go on with if the first epoch is interrupted
        while epoch < settings.epochs and not interrupt.asked:
            started = time.monotonic()
            for x, y in loader:
                losses = step(ens, optimizer, x, y)
                schedule.step()
                bar.update()
                if interrupt.asked:
                    break
            else:
                epoch += 1
                seconds += time.monotonic() - started
                found = evaluate(ens, images)
                line = {"step": epoch * len(loader), "epoch": epoch, "loss": float(losses.mean()), **found}
                folder.log(**line, seconds=seconds)
                save()
                bar.set_postfix(
                    loss=f"{line['loss']:.3f}",
                    mean=f"{found['accuracy']:.1%}",
                    members=f"{found['accuracy_members']:.1%}",
                )
    if epoch < settings.epochs:
        print(f"interrupted; epoch {epoch} is saved, go on with --resume {folder.path}")
        return
    report(settings, folder, ens, loader, images, seconds, steps)


def step(ens: Ensemble, optimizer: SGD, x: Tensor, y: Tensor) -> Tensor:
    """Do one step of all members; their losses `[K]`."""
    optimizer.zero_grad()
    losses = ens.loss(F.cross_entropy, x, y, own=True)
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


def evaluate(ens: Ensemble, images: Images) -> dict[str, float]:
    """Return what the mean prediction is worth on the test images, and the members' mean accuracy."""
    members = probabilities(ens, images)
    each = (members.argmax(2) == images.test_y).float().mean(1)
    return {**scores(members.mean(0), images.test_y), "accuracy_members": float(each.mean())}


def probabilities(ens: Ensemble, images: Images) -> Tensor:
    """`[K, N, classes]` of the test images."""
    return torch.cat([ens.predict(x).members for x in images.test_x.split(500)], 1)


def report(
    settings: TrainEnsemble,
    folder: RunFolder,
    ens: Ensemble,
    loader: MemberLoader,
    images: Images,
    seconds: float,
    steps: int,
) -> None:
    """Print what came of it, and draw the reliability diagram."""
    members = probabilities(ens, images)
    each = (members.argmax(2) == images.test_y).float().mean(1)
    found = scores(members.mean(0), images.test_y)
    plot_reliability(members, images.test_y, folder.path / "reliability.png", settings.data)
    if settings.learning_rates:
        for rate, accuracy in zip(settings.learning_rates, each.tolist(), strict=True):
            print(f"learning rate {rate:g}: test accuracy {accuracy:.2%}")
        best = int(each.argmax())
        print(f"best: learning rate {settings.learning_rates[best]:g}, member {best}")
    low, high = float(each.min()), float(each.max())
    print(f"test accuracy of the mean {found['accuracy']:.2%}, of the members {low:.2%} to {high:.2%}")
    print(f"NLL {found['nll']:.4f}, ECE {found['ece']:.4f}, Brier {found['brier']:.4f}")
    loop = loop_seconds(settings, ens, loader) * steps
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
    try:
        sys.exit(main())
    except PsgradError as error:
        sys.exit(f"error: {error}")
