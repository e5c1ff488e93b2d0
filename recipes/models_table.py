"""The table of models: `python -m recipes.models_table [--models resnet18 ..] [--contenders psgrad ..]`.

Takes every torchvision classification model, and asks psgrad and Opacus for its per-sample gradients; each
answer is compared with one ordinary backward pass per sample, in float64. What was compared is in the JSON
after every model, so that Ctrl-C loses nothing and a run of some models or contenders renews those only.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from tqdm import tqdm

from psgrad import ConfigError
from psgrad.bench import machine
from psgrad.bench.model_gradients import compare, fallbacks
from psgrad.bench.models_report import page
from psgrad.bench.report import require_extra
from psgrad.bench.zoo import model_names, outline
from recipes.config import Settings, from_command_line, run_recipe
from recipes.runs import Interruptible, writable

DEFAULT = Path(__file__).parent.parent / "configs" / "models_table.toml"


class ModelsTable(Settings):
    """Compare per-sample gradients of torchvision's classification models."""

    models: tuple[str, ...] = ()
    """Names as torchvision lists them; none for all."""
    contenders: tuple[Literal["psgrad", "Opacus", "Opacus, no in-place flags"], ...] = ("psgrad",)
    """Who is asked."""
    samples: Annotated[int, Field(ge=2)] = 2
    """Samples per batch."""
    max_parameters: Annotated[float, Field(gt=0)] = 100.0
    """Millions of parameters of the largest model that psgrad is compared on; 100 take 4 GB."""
    max_parameters_others: Annotated[float, Field(gt=0)] = 31.0
    """The same for the others."""
    results: Path = Path("docs/results/models.json")
    """What was compared, renewed."""
    out: Path = Path("docs/models.md")
    """The table."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status.

    Raises
    ------
    ConfigError
        If torchvision lists no model of a name, the results of an earlier run cannot be read, nothing can be
        written, or the `bench` extra is missing.

    """
    settings = from_command_line(ModelsTable, DEFAULT, argv)
    require_extra()
    every = model_names()
    if unknown := sorted(set(settings.models) - set(every)):
        raise ConfigError(f"torchvision lists no model named {', '.join(unknown)}")
    record = read(settings.results)
    for path in (settings.results, settings.out):
        writable(path.parent)
    record["about"] = {**machine.describe(), "samples": str(settings.samples)}
    with tqdm(settings.models or every, desc="models", unit="model") as bar, Interruptible() as interrupt:
        for name in bar:
            bar.set_postfix_str(name)
            row = record["models"].setdefault(name, {"outcomes": {}})
            row["parameters"] = sum(p.numel() for p in outline(name).parameters())
            if "psgrad" in settings.contenders:
                row["fallbacks"] = fallbacks(name)
            for contender in settings.contenders:
                own = contender == "psgrad"
                largest = settings.max_parameters if own else settings.max_parameters_others
                if row["parameters"] > 1e6 * largest or interrupt.asked:
                    continue
                row["outcomes"][contender] = asdict(compare(name, contender, settings.samples))
                gc.collect()
            write(settings.results, json.dumps(record, indent=1, sort_keys=True) + "\n")
            if interrupt.asked:
                break
    write(settings.out, page(record))
    print(f"written to {settings.out} and {settings.results}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """Return an earlier run's record, or an empty one.

    Raises
    ------
    ConfigError
        If the file is something else.

    """
    if not path.exists():
        return {"models": {}}
    try:
        record = json.loads(path.read_text())
        return {"models": dict(record["models"])}
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"{path} holds no results of this recipe: {err}") from err


def write(path: Path, text: str) -> None:
    """Write a file, wholly or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    run_recipe(main)
