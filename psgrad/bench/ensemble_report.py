"""What is left of the ensemble benchmark: Markdown, a picture of time and memory, JSON with everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from psgrad.bench.ensemble import LOOP, Cell, EnsembleResult
from psgrad.bench.ensemble_models import MODELS
from psgrad.bench.sweep import geometric_mean

__all__ = ["acceptance", "draw", "write"]

NOTES = """Speed is the time of a plain loop's step over the contender's in the same round, median over
rounds. A step is forward, backward and SGD with momentum, every member on data of its own. Before any timing
two steps were compared with the loop in float64. "two processes" has one thread in each, half of the members
in a plain loop, and stays alive between rounds. Peak memory is that of two steps in a fresh process, models
and data included, interpreter and imports not; of two processes it is the sum."""

MIB = 2**20


def write(
    results: Sequence[EnsembleResult], left_out: Mapping[str, str], about: Mapping[str, str], folder: Path
) -> None:
    """Write `bench.md` and `bench.json`, whole or not at all, so that a run that is cut off keeps the last.

    Parameters
    ----------
    results
        In any order.
    left_out
        Cells that were not measured, and why.
    about
        The machine and the run.
    folder
        Made if it does not exist.

    """
    results = _ordered(results)
    parts = ["# Training steps of K models at once: speed over the loop", "\n".join(acceptance(results))]
    parts += ["\n".join(f"- {key}: {value}" for key, value in about.items()), NOTES]
    parts += ["![Speed and memory](bench.png)", _table(results, _speed)]
    if any(r.cell.members == 1 for r in results):
        parts.append("Two processes need two members: of one there is nothing to measure.")
    if any(r.loop_memory for r in results):
        parts += ["## Peak memory, MiB", _table(results, _memory, _loop_memory)]
    if left_out:
        parts += ["## Not measured", "\n".join(f"- {cell}: {why}" for cell, why in left_out.items())]
    record = {"about": dict(about), "left_out": dict(left_out), "results": [asdict(r) for r in results]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("bench.md", "\n\n".join(parts)), ("bench.json", json.dumps(record, indent=1))):
        part = folder / f"{name}.part"
        part.write_text(text + "\n")
        part.replace(folder / name)


def acceptance(results: Sequence[EnsembleResult]) -> list[str]:
    """Return the lines that say what was asked for and what was measured."""
    speed = {(r.cell, r.contender): 1 / r.measurement.ratio for r in results if r.measurement}
    own = {cell: value for (cell, contender), value in speed.items() if contender == "psgrad"}

    def mean(values: list[float]) -> str:
        if not values:
            return "not measured"
        return f"{geometric_mean(values):.2f}x ({len(values)} cells)"

    least = min(own, key=lambda cell: own[cell], default=None)
    lines = [
        "- least speed over the loop in any cell (asked: 0.98x): "
        + (f"{own[least]:.2f}x, {least}" if least else "not measured"),
        "- over vmap, convolutional models (asked: 1.5x): "
        + mean([v / speed[c, "vmap"] for c, v in own.items() if c.model != "mlp" and (c, "vmap") in speed]),
        "- over the loop, small CNNs, N <= 16 (asked: 2x): "
        + mean([v for c, v in own.items() if c.model in ("lenet", "small-cnn-bn") and c.batch_size <= 16]),
        "- over the loop, MLP, K = 64, N = 32 (asked: 8x): "
        + mean([v for c, v in own.items() if c == Cell("mlp", 64, 32)]),
    ]
    clipped = {cell: value for (cell, contender), value in speed.items() if contender == "psgrad, clipped"}
    if clipped:
        loops = {c: speed[c, "loop, clipped"] for c in clipped if (c, "loop, clipped") in speed}
        plain = {c: own[c] for c in clipped if c in own}
        lines += [
            "- clipped, over the loop that clips: " + mean([clipped[c] / loops[c] for c in loops]),
            "- clipped, time over the ensemble that does not clip: "
            + mean([plain[c] / clipped[c] for c in plain]),
        ]
    return lines


def draw(results: Sequence[EnsembleResult], path: Path) -> None:
    """Draw speed, and peak memory where there is any: a row a cell, a mark a contender."""
    from matplotlib.figure import Figure

    results = _ordered(results)
    cells = list(dict.fromkeys(r.cell for r in results))
    marks: list[tuple[str, list[tuple[str, float, Cell]]]] = [
        (
            "speed over the loop",
            [(r.contender, 1 / r.measurement.ratio, r.cell) for r in results if r.measurement],
        )
    ]
    memory = [(r.contender, r.memory / MIB, r.cell) for r in results if r.memory]
    if memory:
        loops = {r.cell: r.loop_memory / MIB for r in results if r.loop_memory}
        marks.append(("peak memory, MiB", memory + [(LOOP, value, cell) for cell, value in loops.items()]))
    names = [*dict.fromkeys(r.contender for r in results), LOOP]
    figure = Figure(figsize=(3 + 5 * len(marks), 2 + 0.25 * len(cells)), layout="constrained")
    panels = figure.subplots(1, len(marks), sharey=True, squeeze=False)[0]
    for axes, (label, points) in zip(panels, marks, strict=True):
        for i, name in enumerate(names):
            own = [(value, cells.index(cell)) for who, value, cell in points if who == name]
            if own:
                axes.scatter(*zip(*own, strict=True), color="black" if name == LOOP else f"C{i}", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(cells)), [str(cell) for cell in cells])
    panels[0].invert_yaxis()
    panels[0].axvline(1, color="black", lw=1)
    if any(points for _, points in marks):
        panels[-1].legend()
    figure.savefig(path, dpi=130)


def _ordered(results: Sequence[EnsembleResult]) -> list[EnsembleResult]:
    order = list(MODELS)
    return sorted(results, key=lambda r: (order.index(r.cell.model), r.cell.members, r.cell.batch_size))


def _table(
    results: Sequence[EnsembleResult],
    text: Callable[[EnsembleResult], str],
    of_loop: Callable[[EnsembleResult], str] | None = None,
) -> str:
    """Markdown: a row a cell, a column a contender, and one of the loop's if asked for."""
    from tabulate import tabulate

    names = list(dict.fromkeys(r.contender for r in results))
    rows: dict[Cell, dict[str, str]] = {}
    for r in results:
        row = rows.setdefault(r.cell, {})
        row[r.contender] = text(r)
        if of_loop is not None:
            row[LOOP] = of_loop(r) or row.get(LOOP, "")
    columns = names if of_loop is None else [LOOP, *names]
    return tabulate(
        [[c.model, c.members, c.batch_size, *(row.get(n, "") for n in columns)] for c, row in rows.items()],
        headers=["model", "K", "N", *columns],
        tablefmt="github",
        disable_numparse=True,
    )


def _speed(r: EnsembleResult) -> str:
    return f"{1 / r.measurement.ratio:.2f}x" if r.measurement else str(r.reason)[:60].replace("|", "/")


def _memory(r: EnsembleResult) -> str:
    return f"{r.memory / MIB:.0f}" if r.memory else ""


def _loop_memory(r: EnsembleResult) -> str:
    return f"{r.loop_memory / MIB:.0f}" if r.loop_memory else ""
