"""K models fitted at once against the loop: `python -m recipes.bench_ensemble [--quick]`.

psgrad, the loop with foreach optimizers and stock `torch.func.vmap` take turns with the plain loop, each
after a float64 check. Ctrl-C ends the measuring and reports what there is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from math import exp, log
from pathlib import Path
from typing import Annotated, Literal

from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

from psgrad import ConfigError, PsgradError
from psgrad.bench import machine
from psgrad.bench.ensemble import EnsembleResult, measure_ensemble
from psgrad.bench.report import require_extra
from recipes.config import Settings, from_command_line
from recipes.runs import Interruptible

DEFAULT = Path(__file__).parent.parent / "configs" / "bench_ensemble.toml"
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


def mlp() -> nn.Module:
    """Tabular: 20 features, two hidden layers of 64."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def lenet() -> nn.Module:
    """LeNet-5 with ReLU."""
    convolutions = (nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU())
    head = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *head)


def small_cnn_bn() -> nn.Module:
    """Three convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def resnet20() -> nn.Module:
    """ResNet-20 of the CIFAR experiments, with BatchNorm; shortcuts by 1x1 convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for planes, stride in ((16, 1), (32, 2), (64, 2)):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        layers += [
            BasicBlock(before, planes, stride, shortcut),
            BasicBlock(planes, planes),
            BasicBlock(planes, planes),
        ]
        before = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18_gn() -> nn.Module:
    """torchvision's, with GroupNorm."""
    return resnet18(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(32, channels))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (20,)),
    "lenet": (lenet, (1, 28, 28)),
    "small-cnn-bn": (small_cnn_bn, (3, 32, 32)),
    "resnet20": (resnet20, (3, 32, 32)),
    "resnet18-gn": (resnet18_gn, (3, 32, 32)),
}


class BenchEnsemble(Settings):
    """Time a training step of K models at once against the loop."""

    models: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(MODELS)
    """Which models."""
    members: Counts = (1, 4, 16, 64)
    """K."""
    batch_sizes: Counts = (4, 16, 32, 64, 256)
    """N."""
    rounds: Annotated[int, Field(ge=1)] = 5
    """Timed rounds of a cell."""
    largest_cell: Annotated[int, Field(ge=1)] = 2048
    """Cells whose K times N is larger are left out, and named in the report."""
    minutes: Annotated[float, Field(gt=0)] = 6.0
    """No cell begins after so long; those left are named in the report."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    quick: bool = False
    """A look in under two minutes."""
    out: Path = Path("runs/bench_ensemble")
    """Folder of the table, the picture and the JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status.

    Raises
    ------
    ConfigError
        If a model does not exist, or nothing was measured.

    """
    settings = from_command_line(BenchEnsemble, DEFAULT, argv)
    require_extra()
    if settings.quick:
        cut = {"models": ("mlp", "lenet"), "members": (4, 16), "batch_sizes": (4, 16), "rounds": 3}
        settings = settings.model_copy(update=cut)
    unknown = [name for name in settings.models if name not in MODELS]
    if unknown:
        raise ConfigError(f"models: no {', '.join(unknown)}; there are {', '.join(MODELS)}")
    cells = [(m, k, n) for k in settings.members for n in settings.batch_sizes for m in settings.models]
    cells.sort(key=lambda cell: cell[1] * cell[2])  # what the time does not suffice for are the largest
    results: list[EnsembleResult] = []
    left_out: list[str] = []
    end = time.monotonic() + 60 * settings.minutes
    with tqdm(cells, desc="bench", unit="cell") as bar, Interruptible() as interrupt:
        for model, members, n in bar:
            cell = f"{model} K={members} N={n}"
            bar.set_postfix_str(cell)
            if interrupt.asked or members * n > settings.largest_cell or time.monotonic() > end:
                left_out.append(cell)
                continue
            found = measure_ensemble(
                model,
                *MODELS[model],
                members,
                n,
                rounds=settings.rounds,
                device=settings.device,
                stop=lambda: interrupt.asked,
            )
            results += found
            left_out += [] if found else [cell]
    if not results:
        raise ConfigError("nothing was measured")
    write(results, left_out, settings)
    print((settings.out / "bench.md").read_text())
    return 0


def acceptance(results: list[EnsembleResult]) -> list[str]:
    """Return the lines that say what issue and figures have to do with one another."""
    speed = {
        (r.model, r.members, r.batch_size, r.contender): 1 / r.measurement.ratio
        for r in results
        if r.measurement
    }
    own = {cell[:3]: value for cell, value in speed.items() if cell[3] == "psgrad"}

    def mean(values: list[float]) -> str:
        return (
            f"{exp(sum(map(log, values)) / len(values)):.2f}x ({len(values)} cells)"
            if values
            else "not measured"
        )

    least = min(own, key=lambda cell: own[cell]) if own else None
    convolutional = {cell: value for cell, value in own.items() if cell[0] != "mlp"}
    return [
        "- least speed over the loop in any cell (asked: 0.98x): "
        + (f"{own[least]:.2f}x, {least[0]} K={least[1]} N={least[2]}" if least else "not measured"),
        "- over vmap, convolutional models (asked: 1.5x): "
        + mean([v / speed[*c, "vmap"] for c, v in convolutional.items() if (*c, "vmap") in speed]),
        "- over the loop, small CNNs, N <= 16 (asked: 2x): "
        + mean([v for c, v in own.items() if c[0] in ("lenet", "small-cnn-bn") and c[2] <= 16]),
        "- over the loop, MLP, K = 64, N = 32 (asked: 8x): "
        + mean([v for c, v in own.items() if c == ("mlp", 64, 32)]),
    ]


def write(results: list[EnsembleResult], left_out: list[str], settings: BenchEnsemble) -> None:
    """Write `bench.md`, `bench.png` and `bench.json`."""
    from tabulate import tabulate

    names = list(dict.fromkeys(r.contender for r in results))
    rows: dict[tuple[str, int, int], dict[str, str]] = {}
    order = list(MODELS)
    results = sorted(results, key=lambda r: (order.index(r.model), r.members, r.batch_size))
    for r in results:
        text = f"{1 / r.measurement.ratio:.2f}x" if r.measurement else str(r.reason)[:60].replace("|", "/")
        rows.setdefault((r.model, r.members, r.batch_size), {})[r.contender] = text
    about = machine.describe(settings.device)
    table = tabulate(
        [[*cell, *(found.get(name, "") for name in names)] for cell, found in rows.items()],
        headers=["model", "K", "N", *names],
        tablefmt="github",
        disable_numparse=True,
    )
    parts = ["# Training steps of K models at once: speed over the loop", "\n".join(acceptance(results))]
    parts += ["\n".join(f"- {key}: {value}" for key, value in about.items()), "![Speed](bench.png)", table]
    if left_out:
        parts.append(f"Not measured: {', '.join(left_out)}.")
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "bench.md").write_text("\n\n".join(parts) + "\n")
    record = {"about": about, "left_out": left_out, "results": [asdict(r) for r in results]}
    (settings.out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    figure = Figure(figsize=(8, 2 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        own = [r for r in results if r.contender == name and r.measurement]
        where = [list(rows).index((r.model, r.members, r.batch_size)) for r in own]
        axes.scatter(
            [1 / r.measurement.ratio for r in own if r.measurement], where, color=f"C{i}", label=name
        )
    axes.set_yticks(range(len(rows)), [f"{m} K={k} N={n}" for m, k, n in rows])
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("speed over the loop")
    axes.legend()
    figure.savefig(settings.out / "bench.png", dpi=130)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PsgradError as error:
        sys.exit(f"error: {error}")
