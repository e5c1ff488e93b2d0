"""What is left of the step benchmark: Markdown tables, a picture of time and memory, JSON with everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from psgrad.bench.report import record_of, require_extra
from psgrad.bench.step import StepResult
from psgrad.bench.sweep import geometric_mean

__all__ = ["draw", "largest_table", "memory_table", "summary", "time_table", "write"]

NOTES = """\
A step is forward, backward and SGD's update. Time and peak memory are over those of the same step without
per-sample gradients: time in the same round, median (quartiles); memory each in a process of its own. Before
it is timed, each contender's mean of clipped gradients is compared with a float64 loop over the samples,
parameter by parameter; half of the samples are clipped. Who is wrong or raises has its reason in place of a
number. The least of those that clip is bold: "psgrad norms" only looks, and leaves the ordinary gradient."""

ONLY_LOOKS = "psgrad norms"


def time_table(results: Sequence[StepResult]) -> str:
    """Markdown: a row a model and batch size, a column a contender, ratios of time or reasons."""

    def cell(result: StepResult) -> str:
        if result.measurement is None:
            return shorten(result.reason or "", 100, placeholder=" ...").replace("|", "/")
        low, high = result.measurement.spread
        return f"{result.measurement.ratio:.2f} ({low:.2f}-{high:.2f})"

    return _table(results, _time, cell)


def memory_table(results: Sequence[StepResult]) -> str:
    """Markdown: ratios of peak memory."""
    return _table(results, _memory, lambda r: "" if r.memory is None else f"{r.memory:.2f}")


def largest_table(results: Sequence[StepResult]) -> str:
    """Markdown: the largest batch that fits the budget, a row a model."""
    first = {(r.case, r.contender): r for r in reversed(results) if r.largest_batch is not None}
    return _table(
        list(reversed(first.values())), lambda r: None, lambda r: str(r.largest_batch), with_size=False
    )


def summary(results: Sequence[StepResult]) -> str:
    """Markdown: geometric means of time and memory for each contender, and over how many rows."""
    require_extra()
    from tabulate import tabulate

    rows = []
    for name in dict.fromkeys(r.contender for r in results):
        own = [r for r in results if r.contender == name]
        times = [t for r in own if (t := _time(r)) is not None]
        memories = [m for r in own if (m := _memory(r)) is not None]
        rows.append([name, _mean(times), len(times), _mean(memories), len(memories)])
    headers = ["contender", "time", "rows", "memory", "rows"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def draw(results: Sequence[StepResult], path: Path, title: str) -> None:
    """Draw time and memory over the non-private step's: a row a model and batch size, a mark a contender."""
    rows = list(dict.fromkeys((r.case, r.batch_size) for r in results))
    contenders = list(dict.fromkeys(r.contender for r in results))
    panels = [("time", _time)]
    if any(r.memory is not None for r in results):
        panels.append(("peak memory", _memory))
    figure = Figure(figsize=(3 + 4.2 * len(panels), 2.2 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (what, value) in zip(all_axes, panels, strict=True):
        for i, name in enumerate(contenders):
            points = [
                (v, rows.index((r.case, r.batch_size)) + 0.06 * (i - len(contenders) / 2))
                for r in results
                if r.contender == name and (v := value(r)) is not None
            ]
            ours = name.startswith("psgrad")
            axes.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                color=f"C{i % 10}",
                marker="D" if ours else "^" if "psgrad" in name else "o",
                s=55 if ours else 30,
                label=name,
                zorder=3,
            )
        axes.axvline(1, color="black", lw=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        axes.set_xlabel(f"{what} of a step / non-private step")
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_yticks(range(len(rows)), [f"{case}  N={n}" for case, n in rows])
    all_axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)


def write(results: Sequence[StepResult], folder: Path, *, title: str, about: Mapping[str, str]) -> None:
    """Write `bench.md`, `bench.png` and `bench.json` into a folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    parts = [f"# {title}", facts, NOTES, "![Time and memory](bench.png)", summary(results)]
    parts += ["## Time", time_table(results)]
    if any(r.memory is not None for r in results):
        parts += ["## Peak memory", memory_table(results)]
    if any(r.largest_batch is not None for r in results):
        parts += [f"## Largest batch in {about['memory budget']}", largest_table(results)]
    (folder / "bench.md").write_text("\n\n".join(parts) + "\n")
    record = {"title": title, "about": dict(about), "results": [record_of(result) for result in results]}
    (folder / "bench.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    draw(results, folder / "bench.png", f"{title}\n{about.get('machine', '')}")


def _time(result: StepResult) -> float | None:
    return None if result.measurement is None else result.measurement.ratio


def _memory(result: StepResult) -> float | None:
    return result.memory


def _mean(values: Sequence[float]) -> str:
    return f"{geometric_mean(values):.2f}x" if values else ""


def _table(
    results: Sequence[StepResult],
    value: Callable[[StepResult], float | None],
    cell: Callable[[StepResult], str],
    *,
    with_size: bool = True,
) -> str:
    """Rows by model and batch size in order of appearance; the least value of those that clip is bold."""
    require_extra()
    from tabulate import tabulate

    contenders = list(dict.fromkeys(r.contender for r in results))
    rows: dict[tuple[str, int], dict[str, StepResult]] = {}
    for r in results:
        rows.setdefault((r.case, r.batch_size if with_size else 0), {})[r.contender] = r
    lines = []
    for (case, batch_size), cells in rows.items():
        values = {n: v for n, r in cells.items() if n != ONLY_LOOKS and (v := value(r)) is not None}
        best = min(values, key=lambda n: values[n]) if values else None
        texts = [cell(cells[n]) if n in cells else "" for n in contenders]
        marked = [f"**{t}**" if n == best else t for n, t in zip(contenders, texts, strict=True)]
        lines.append([case, *([batch_size] if with_size else []), *marked])
    headers = ["model", *(["N"] if with_size else []), *contenders]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
