"""Train on wrong labels, with and without clipping: `python -m recipes.clip_norms`.

A part of the training labels is replaced by wrong ones. Mislabelled samples pull hard, as their gradients
stay long when those of the others have shrunk; clipping every sample's gradient caps the pull. Both ways
train the same model from the same weights on the same batches, tested on labels that are right; the picture
shows the norms of the samples with right and with wrong labels. No privacy is claimed: there is no noise.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from psgrad import GradNorms, clip_per_sample, keep_freed_memory
from recipes.config import Count, Positive, from_command_line, run_recipe
from recipes.data import DataSettings, Images, load_images
from recipes.models import accuracy, small_cnn
from recipes.pictures import plot_norms
from recipes.runs import Interruptible, RunFolder

DEFAULT = Path(__file__).parent.parent / "configs" / "clip_norms.toml"


class ClipNorms(DataSettings):
    """Train a CNN on mislabelled images, with and without clipping."""

    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Chance of each training label to be replaced by a wrong one."""
    max_norm: Positive = 0.1
    """Norm that each sample's gradient is clipped to."""
    epochs: Count = 30
    """Passes over the training images."""
    batch_size: Count = 64
    """Images per step."""
    learning_rate: Positive = 0.02
    """Of SGD without clipping."""
    clipped_learning_rate: Positive = 0.5
    """Of SGD with clipping, whose gradients are shorter."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    seed: int = 0
    """Of labels, weights and batches."""
    out: Path | None = None
    """The run's folder; runs/clip_norms/<time> if not given."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status."""
    settings = from_command_line(ClipNorms, DEFAULT, argv)
    folder = RunFolder(settings.out, "clip_norms")
    started = time.monotonic()
    images = load_images(settings.data, settings.data_root, settings.download)
    folder.make()
    folder.history(up_to_step=0)  # forgets what a run left that was lost
    choices = torch.Generator().manual_seed(settings.seed)
    wrong, labels = mislabelled(images.train_y, settings.label_noise, images.classes, choices)
    print(f"{len(labels)} images, {int(wrong.sum())} with a wrong label; run folder {folder.path}")
    history: dict[str, list[float]] = {}
    models: dict[str, nn.Module] = {}
    with Interruptible() as interrupt:
        for way in ("ordinary", "clipped"):
            torch.manual_seed(settings.seed)
            models[way] = small_cnn(*images.shape, images.classes)
            history[way] = train(settings, models[way], images, labels, way, folder, interrupt)
    folder.save(
        {
            "settings": settings.model_dump(mode="json"),
            "models": {way: model.state_dict() for way, model in models.items()},
        }
    )
    norms = {way: sample_norms(model, images.train_x, labels) for way, model in models.items()}
    plot_norms(
        history, norms, wrong, folder.path / "norms.png", f"{settings.data}, {settings.label_noise:.0%} wrong"
    )
    if interrupt.asked:
        print("interrupted: the picture shows how far it went")
    for way, model in models.items():
        print(
            f"{way}: test accuracy {accuracy(model, images):.2%}; a wrong label has the longer gradient "
            f"in {separation(norms[way], wrong):.0%} of pairs"
        )
    print(f"{time.monotonic() - started:.0f} seconds")
    return 0


def mislabelled(y: Tensor, chance: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which labels `[N]` are wrong, each with this chance, and all labels with the wrong ones in."""
    wrong = torch.rand(len(y), generator=generator) < chance
    other = (y + torch.randint(1, classes, y.shape, generator=generator)) % classes
    return wrong, torch.where(wrong, other, y)


def train(
    settings: ClipNorms,
    model: nn.Module,
    images: Images,
    labels: Tensor,
    way: str,
    folder: RunFolder,
    interrupt: Interruptible,
) -> list[float]:
    """Train in one of the two ways; return the test accuracy after each epoch."""
    clip = clip_per_sample(model, settings.max_norm) if way == "clipped" else None
    rate = settings.clipped_learning_rate if clip else settings.learning_rate
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=settings.momentum)
    batches = torch.Generator().manual_seed(settings.seed)
    accuracies: list[float] = []
    bar = tqdm(range(settings.epochs), desc=way, unit="epoch")
    for epoch in bar:
        clipped = 0
        for batch in torch.randperm(len(labels), generator=batches).split(settings.batch_size):
            if interrupt.asked:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(images.train_x[batch]), labels[batch]).backward()
            optimizer.step()
            clipped += int(clip.result.clipped.sum()) if clip else 0
        if interrupt.asked:
            break
        accuracies.append(accuracy(model, images))
        fraction = clipped / len(labels)
        folder.log(way=way, step=epoch + 1, accuracy=accuracies[-1], clipped=fraction)
        bar.set_postfix(accuracy=f"{accuracies[-1]:.1%}", clipped=f"{fraction:.0%}")
    if clip:
        clip.remove()
    return accuracies


def sample_norms(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Every training sample's gradient norm `[N]`; the model's gradients are cleared."""
    parts = []
    with GradNorms(model, "sum") as monitor:
        parts_of_both = zip(x.split(500), labels.split(500), strict=True)
        for part_x, part_y in tqdm(parts_of_both, desc="norms", total=-(-len(x) // 500), unit="part"):
            F.cross_entropy(model(part_x), part_y, reduction="sum").backward()
            parts.append(monitor.norms)
            model.zero_grad()
    return torch.cat(parts)


def separation(norms: Tensor, wrong: Tensor) -> float:
    """Chance that a wrong label's norm is above a right label's: the area under the ROC curve."""
    below = torch.searchsorted(norms[~wrong].sort().values, norms[wrong])
    return below.double().mean().item() / max(1, int((~wrong).sum()))


if __name__ == "__main__":
    keep_freed_memory()
    run_recipe(main)
