"""A training step with clipping against one without: `python -m recipes.bench_step [--quick]`.

psgrad, Opacus in all its modes (by itself and with psgrad inside), `torch.func` and BackPACK. Each is first
compared with a float64 loop, and who is wrong gets no number. Then all take turns with the non-private step.
Peak memory is measured in a fresh process each. The report is written after every case; Ctrl-C ends the
measuring and reports what there is.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tqdm import tqdm

from psgrad import ConfigError, keep_freed_memory
from psgrad.bench import machine, step_report
from psgrad.bench.report import require_extra
from psgrad.bench.step import StepResult, measure_step
from psgrad.bench.step_memory import FLOOR, largest_batch, peak_memory
from psgrad.bench.step_models import MODELS
from psgrad.bench.step_peers import STEPPERS, StepperMaker
from recipes.config import Positive, Settings, from_command_line, run_recipe
from recipes.runs import Interruptible, writable

DEFAULT = Path(__file__).parent.parent / "configs" / "bench_step.toml"
QUICK = ("resnet18-gn:8", "tanh-cnn-28:64", "tiny:16")


class BenchStep(Settings):
    """Time a training step with clipping, and measure its memory, against the step without."""

    cases: Annotated[tuple[str, ...], Field(min_length=1)] = ("tiny:16",)
    """What is trained, each MODEL:BATCH_SIZE."""
    contenders: tuple[str, ...] = ()
    """Who; all if none is named."""
    rounds: Annotated[int, Field(ge=1)] = 9
    """Most timed rounds for a case."""
    seconds: Positive = 40.0
    """Time for the rounds of a case. Three are done whatever they take."""
    memory: bool = True
    """Measure peak memory as well."""
    memory_limit_gib: Positive = 8.0
    """Who would hold more than half of this in per-sample gradients is not run."""
    largest_batch_gib: Annotated[float, Field(ge=0)] = 0.0
    """Search the largest batch whose step fits this much memory: minutes a model; 0 for no search."""
    keep_freed: bool = True
    """Have the process keep memory that it frees, for all alike: `psgrad.keep_freed_memory`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    quick: bool = False
    """A look in under two minutes: three small cases, three rounds."""
    out: Path = Path("runs/bench_step")
    """Folder of the tables, the picture and the JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status.

    Raises
    ------
    ConfigError
        If a case, contender or device does not exist, nothing can be written, or Ctrl-C came before the first
        case was done.

    """
    settings = from_command_line(BenchStep, DEFAULT, argv)
    require_extra()
    machine.require_device(settings.device)
    cases = [parse_case(case) for case in (QUICK if settings.quick else settings.cases)]
    makers = chosen(settings.contenders)
    writable(settings.out)
    if settings.quick:
        settings = settings.model_copy(update={"rounds": 3})
    if settings.keep_freed:
        keep_freed_memory()
    # What the peers say once a layer; a layer that BackPACK does not know is in the report.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Extension saving to grad_batch does not have")
    warnings.filterwarnings("ignore", message="There is a performance drop")  # of vmap, seen in its numbers

    with Interruptible() as interrupt:
        results = measure_cases(cases, makers, settings, interrupt)
        searched = search_largest(results, settings, interrupt) if settings.largest_batch_gib else {}
    if interrupt.asked:
        print("interrupted; this is what was measured")
    if not results:
        raise ConfigError("nothing was measured")

    write(results, searched, settings)
    print(step_report.time_table(results))
    print()
    print(step_report.summary(results))
    print(f"\nwritten to {settings.out}")
    return 0


def measure_cases(
    cases: list[tuple[str, int]],
    makers: dict[str, StepperMaker],
    settings: BenchStep,
    interrupt: Interruptible,
) -> list[StepResult]:
    """Measure time, and memory if asked for, case after case; the report is written after each."""
    results: list[StepResult] = []
    with tqdm(cases, desc="bench", unit="case") as bar:
        for model, n in bar:
            bar.set_postfix_str(f"{model}, N={n}")
            timed = measure_step(
                model,
                MODELS[model],
                n,
                makers,
                rounds=settings.rounds,
                seconds=settings.seconds,
                memory_limit=settings.memory_limit_gib * 2**30,
                device=settings.device,
                stop=lambda: interrupt.asked,
            )
            if settings.memory and not interrupt.asked:
                bar.set_postfix_str(f"{model}, N={n}, memory")
                floor = peak_memory(model, FLOOR, n, device=settings.device)
                timed = [
                    result
                    if floor is None or result.measurement is None or interrupt.asked
                    else with_memory(result, floor, settings.device)
                    for result in timed
                ]
            results += timed
            if interrupt.asked:
                break
            write(results, {}, settings)
    return results


def search_largest(
    results: list[StepResult], settings: BenchStep, interrupt: Interruptible
) -> dict[tuple[str, str], int | None]:
    """Return the largest batch by model and contender that was measured, the non-private step first."""
    searched: dict[tuple[str, str], int | None] = {}
    pairs = dict.fromkeys((r.case, r.contender) for r in results if r.measurement is not None)
    everyone = [*dict.fromkeys((case, FLOOR) for case, _ in pairs), *pairs]
    for model, contender in tqdm(everyone, desc="largest batch"):
        if interrupt.asked:
            break
        searched[model, contender] = largest(model, contender, settings)
    return searched


def write(
    results: list[StepResult], searched: dict[tuple[str, str], int | None], settings: BenchStep
) -> None:
    """Write the report of what was measured so far, and of the largest batches that were searched."""
    results = [replace(r, largest_batch=searched.get((r.case, r.contender))) for r in results]
    about = {**machine.describe(settings.device), "rounds": f"up to {settings.rounds}"}
    if searched:
        about["memory budget"] = f"{settings.largest_batch_gib:g} GiB"
        alone = ", ".join(f"{model} {n or 'none'}" for (model, name), n in searched.items() if name == FLOOR)
        about["largest batch of the non-private step"] = alone
    title = "A training step with per-sample gradients"
    step_report.write(results, settings.out, title=title, about=about)


def parse_case(text: str) -> tuple[str, int]:
    """Return model and batch size of "MODEL:BATCH_SIZE".

    Raises
    ------
    ConfigError
        If there is no such model, or the batch size is no positive number.

    """
    model, _, size = text.partition(":")
    if model not in MODELS:
        raise ConfigError(f"cases: no model {model!r}; there are {', '.join(MODELS)}")
    if not size.isdecimal() or int(size) == 0:
        raise ConfigError(f"cases: {text!r} is not MODEL:BATCH_SIZE, as {model}:32 is")
    return model, int(size)


def chosen(names: tuple[str, ...]) -> dict[str, StepperMaker]:
    """Return the contenders of these names, all without any.

    Raises
    ------
    ConfigError
        If one does not exist.

    """
    unknown = [name for name in names if name not in STEPPERS]
    if unknown:
        raise ConfigError(f"contenders: no {', '.join(map(repr, unknown))}; there are {', '.join(STEPPERS)}")
    return {name: STEPPERS[name] for name in names} or STEPPERS


def with_memory(result: StepResult, floor: int, device: str) -> StepResult:
    """Return the result with the ratio of its peak memory to the non-private step's, measured now."""
    peak = peak_memory(result.case, result.contender, result.batch_size, device=device)
    return replace(result, memory=None if peak is None else peak / floor)


def largest(model: str, contender: str, settings: BenchStep) -> int | None:
    """Return the largest batch of a contender in the budget of the settings."""
    budget = settings.largest_batch_gib * 2**30

    def fits(n: int) -> bool:
        peak = peak_memory(model, contender, n, device=settings.device)
        return peak is not None and peak <= budget

    return largest_batch(fits)


if __name__ == "__main__":
    run_recipe(main)
