"""K models fitted at once against the loop: `python -m recipes.bench_ensemble [--quick]`.

psgrad, the loop with foreach and fused optimizers, stock `torch.func.vmap` and two processes of one thread
take turns with the plain loop, each after a float64 check. Peak memory is measured in a fresh process each.
The report is written after every cell; Ctrl-C ends the measuring.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tqdm import tqdm

from psgrad import ConfigError, keep_freed_memory
from psgrad.bench import ensemble_report, machine
from psgrad.bench.ensemble import Cell, EnsembleResult, measure_cell
from psgrad.bench.ensemble_models import MODELS
from psgrad.bench.report import require_extra
from recipes.config import Count, Positive, Settings, from_command_line, run_recipe
from recipes.runs import Interruptible, writable

DEFAULT = Path(__file__).parent.parent / "configs" / "bench_ensemble.toml"
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
QUICK = {
    "models": ("mlp", "lenet"),
    "members": (4, 16),
    "batch_sizes": (4, 16),
    "seconds_each": 0.2,
    "minutes": 1.5,
    "cell_seconds": 15.0,
}


class BenchEnsemble(Settings):
    """Time a training step of K models at once against the loop, and measure its memory."""

    models: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(MODELS)
    """Which models."""
    members: Counts = (1, 4, 16, 64)
    """K."""
    batch_sizes: Counts = (4, 16, 32, 64, 256)
    """N."""
    rounds: Count = 200
    """Timed rounds of a cell at most."""
    seconds_each: Positive = 0.5
    """Time for a contender's rounds of a cell. Five are done whatever they take."""
    largest_cell: Count = 2048
    """Cells whose K times N is larger are left out, and named in the report."""
    minutes: Positive = 6.0
    """No cell begins after so long; those left are named in the report."""
    cell_seconds: Positive = 30.0
    """Time for a cell. One that has no round by then is left out, and named in the report."""
    clipped: bool = False
    """Time the loop and the ensemble also with every sample clipped."""
    memory: bool = True
    """Measure peak memory as well."""
    keep_freed: bool = True
    """Have processes keep memory that they free, for all alike: `psgrad.keep_freed_memory`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    quick: bool = False
    """A look in under two minutes."""
    out: Path = Path("runs/bench_ensemble")
    """Folder of the tables, the picture and the JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status.

    Raises
    ------
    ConfigError
        If a model or the device does not exist, nothing can be written, or nothing was measured.

    """
    settings = from_command_line(BenchEnsemble, DEFAULT, argv)
    require_extra()
    machine.require_device(settings.device)
    if settings.quick:
        settings = settings.model_copy(update=QUICK)
    if settings.keep_freed:
        keep_freed_memory()
    unknown = [name for name in settings.models if name not in MODELS]
    if unknown:
        raise ConfigError(f"models: no {', '.join(unknown)}; there are {', '.join(MODELS)}")
    writable(settings.out)
    cells = [Cell(m, k, n) for k in settings.members for n in settings.batch_sizes for m in settings.models]
    cells.sort(
        key=lambda cell: cell.members * cell.batch_size
    )  # what time does not suffice for are the largest
    about = {**machine.describe(settings.device), "rounds": f"5 to {settings.rounds}"}
    results: list[EnsembleResult] = []
    left_out: dict[str, str] = {}
    end = time.monotonic() + 60 * settings.minutes
    with tqdm(cells, desc="bench", unit="cell") as bar, Interruptible() as interrupt:
        for cell in bar:
            bar.set_postfix_str(str(cell))
            seconds = min(settings.cell_seconds, end - time.monotonic())
            if interrupt.asked:
                left_out[str(cell)] = "stopped"
            elif cell.members * cell.batch_size > settings.largest_cell:
                left_out[str(cell)] = f"K times N is over {settings.largest_cell}"
            elif seconds <= 0:
                left_out[str(cell)] = f"the {settings.minutes:g} minutes were over"
            else:
                found = measure_cell(
                    cell,
                    rounds=settings.rounds,
                    seconds=seconds,
                    seconds_each=settings.seconds_each,
                    clipped=settings.clipped,
                    memory=settings.memory,
                    device=settings.device,
                    stop=lambda: interrupt.asked,
                )
                if isinstance(found, str):
                    left_out[str(cell)] = found
                else:
                    results += found
                    ensemble_report.write(results, left_out, about, settings.out)
    if interrupt.asked:
        print("interrupted; this is what was measured")
    if not results:
        reasons = "; ".join(f"{cell}: {why}" for cell, why in left_out.items())
        raise ConfigError(f"nothing was measured ({reasons})")
    ensemble_report.draw(results, settings.out / "bench.png")
    ensemble_report.write(results, left_out, about, settings.out)
    print((settings.out / "bench.md").read_text())
    return 0


if __name__ == "__main__":
    run_recipe(main)
