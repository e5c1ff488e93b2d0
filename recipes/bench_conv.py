"""Per-sample gradients of single convolutions, timed: `python -m recipes.bench_conv [--quick]`.

Every contender is compared with a float64 loop first, and a wrong one gets no number. Then all are timed
in turn, round after round, against the layer's ordinary weight gradient. Ctrl-C ends the measuring and
reports what there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tqdm import tqdm

from psgrad import ConfigError, PsgradError
from psgrad.bench import machine, report
from psgrad.bench.cases import CASE_SETS
from psgrad.bench.peers import SUITES
from psgrad.bench.rules import RULE_CASES, measure_rule_case
from psgrad.bench.sweep import Result, measure_case
from psgrad.conv.strategies import Verb
from recipes.config import Settings, from_command_line
from recipes.runs import Interruptible

DEFAULT = Path(__file__).parent.parent / "configs" / "bench_conv.toml"
Count = Annotated[int, Field(ge=1)]
SetName = Literal["resnet18-cifar", "depthwise", "conv1d", "pointwise-and-groups", "tiny"]


class BenchConv(Settings):
    """Time the ways of computing one convolution's per-sample weight gradients."""

    suite: Literal["strategies", "norms", "rules"] = "strategies"
    """Ways of computing per-sample gradients, their norms, or the batch rules under torch.vmap."""
    sets: Annotated[tuple[SetName, ...], Field(min_length=1)] = ("tiny",)
    """Sets of layers."""
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (8,)
    """Samples per batch."""
    rounds: Count = 11
    """Timed rounds per layer and batch size."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    quick: bool = False
    """A look in under two minutes: batches of 4, seven rounds."""
    out: Path = Path("runs/bench_conv")
    """Folder of the table, the picture and the JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status.

    Raises
    ------
    ConfigError
        If Ctrl-C came before the first layer was done.

    """
    settings = from_command_line(BenchConv, DEFAULT, argv)
    report.require_extra()
    batch_sizes, rounds = ((4,), 7) if settings.quick else (settings.batch_sizes, settings.rounds)
    measure: dict[str, Callable[..., list[Result]]] = {}
    if settings.suite == "rules":
        title, floor = "Batch rules of convolution under torch.vmap", "same call on PyTorch's own rules"
        measure = {rule.name: partial(measure_rule_case, rule) for rule in RULE_CASES}
    else:
        verb: Verb = "grads" if settings.suite == "strategies" else "sq_norms"
        what = "gradients" if verb == "grads" else "gradient norms"
        title, floor = f"Per-sample {what} of a convolution", "layer's ordinary weight gradient"
        measure = {
            f"{case.name}, N={n}": partial(measure_case, case, n, SUITES[settings.suite], verb=verb)
            for name in settings.sets
            for case in CASE_SETS[name]
            for n in batch_sizes
        }

    results: list[Result] = []
    with tqdm(measure.items(), desc="bench", unit="case") as bar, Interruptible() as interrupt:
        for name, run in bar:
            bar.set_postfix_str(name)
            results += run(rounds=rounds, device=settings.device, stop=lambda: interrupt.asked)
            if interrupt.asked:
                break
    if interrupt.asked:
        print("interrupted; this is what was measured")
    if not results:
        raise ConfigError("nothing was measured")

    about = {**machine.describe(settings.device), "rounds": str(rounds)}
    report.write(results, settings.out, title=title, about=about, floor=floor)
    print(report.table(results))
    print()
    print(report.summary(results))
    print(f"\nwritten to {settings.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PsgradError as error:
        sys.exit(f"error: {error}")
