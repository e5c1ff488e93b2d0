"""What is left of a benchmark: a Markdown table, a picture, and JSON with everything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from psgrad.bench.sweep import Result, geometric_means
from psgrad.errors import ConfigError

__all__ = ["draw", "record_of", "require_extra", "summary", "table", "write"]


def require_extra() -> None:
    """Make sure that reports can be written before anything is measured.

    Raises
    ------
    ConfigError
        If the packages of the `bench` extra are missing; says how to install them.

    """
    missing = [package for package in ("backpack", "tabulate") if find_spec(package) is None]
    if missing:
        raise ConfigError(f'the benchmarks need {" and ".join(missing)}: pip install "psgrad[bench]"')


def table(results: Sequence[Result]) -> str:
    """Markdown: a row a case and batch size, a column a contender.

    A cell is the median of the ratios to the floor and their quartiles; the least is bold. A contender
    that is wrong or fails has its reason there.
    """
    require_extra()
    from tabulate import tabulate

    contenders, rows = _grid(results)
    lines = []
    for (case, batch_size), cells in rows.items():
        best = _best(cells)
        line: list[object] = [case, batch_size]
        for name in contenders:
            text = _cell(cells[name]) if name in cells else ""
            line.append(f"**{text}**" if name == best else text)
        lines.append(line)
    return tabulate(lines, headers=["layer", "N", *contenders], tablefmt="github")


def summary(results: Sequence[Result]) -> str:
    """Markdown: the geometric mean of each contender's ratios, and over how many cases."""
    require_extra()
    from tabulate import tabulate

    means = geometric_means(list(results))
    rows = [[name, f"{mean:.2f}x", count] for name, (mean, count) in means.items()]
    return tabulate(rows, headers=["contender", "geometric mean", "cases"], tablefmt="github")


def draw(results: Sequence[Result], path: Path, title: str, floor: str) -> None:
    """Draw who wins where: a heat map of the ratios, the least of each row framed."""
    contenders, rows = _grid(results)
    ratios = np.full((len(rows), len(contenders)), np.nan)
    figure = Figure(figsize=(3.2 + 1.1 * len(contenders), 1.4 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, cells in enumerate(rows.values()):
        best = _best(cells)
        for j, name in enumerate(contenders):
            result = cells.get(name)
            if result is None:
                continue
            if result.measurement is None:
                axes.text(
                    j, i, "wrong" if result.error > 0 else "fails", ha="center", va="center", fontsize=8
                )
                continue
            ratios[i, j] = result.measurement.ratio
            weight = "bold" if name == best else "normal"
            color = "white" if abs(np.log2(ratios[i, j])) > 2.3 else "black"
            text = f"{ratios[i, j]:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, fontweight=weight, color=color)
            if name == best:
                axes.plot(
                    [j - 0.47, j + 0.47, j + 0.47, j - 0.47, j - 0.47],
                    [i - 0.45, i - 0.45, i + 0.45, i + 0.45, i - 0.45],
                    color="black",
                    lw=1.5,
                )
    norm = TwoSlopeNorm(vcenter=0, vmin=-3, vmax=3)  # an eighth of the floor to eight times it
    image = axes.imshow(np.log2(ratios), cmap="RdYlGn_r", norm=norm, aspect="auto")
    axes.set_xticks(range(len(contenders)), contenders)
    axes.set_yticks(range(len(rows)), [f"{case}  N={n}" for case, n in rows])
    axes.set_title(title, fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=range(-3, 4))
    bar.ax.set_yticklabels([f"{2.0**t:g}x" for t in range(-3, 4)])
    bar.set_label(f"time / {floor}")
    figure.savefig(path, dpi=130)


def write(
    results: Sequence[Result],
    folder: Path,
    *,
    title: str,
    about: Mapping[str, str],
    floor: str = "ordinary weight gradient",
) -> None:
    """Write `bench.md`, `bench.png` and `bench.json` into a folder, made if missing.

    `floor` says what the ratios refer to. Without results there is no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    note = f"Time over the time of the {floor}, in the same round: median (quartiles). The least is bold."
    parts = [f"# {title}", facts, note, table(results), summary(results)]
    (folder / "bench.md").write_text("\n\n".join(parts) + "\n")
    record = {"title": title, "about": dict(about), "results": [record_of(result) for result in results]}
    (folder / "bench.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if results:
        draw(results, folder / "bench.png", f"{title}\n{about.get('machine', '')}", floor)


def _grid(
    results: Sequence[Result],
) -> tuple[list[str], dict[tuple[str, int], dict[str, Result]]]:
    """Contenders in order of appearance, and their results by case and batch size."""
    contenders = list(dict.fromkeys(result.contender for result in results))
    rows: dict[tuple[str, int], dict[str, Result]] = {}
    for result in results:
        rows.setdefault((result.case, result.batch_size), {})[result.contender] = result
    return contenders, rows


def _best(cells: Mapping[str, Result]) -> str | None:
    ratios = {name: r.measurement.ratio for name, r in cells.items() if r.measurement is not None}
    return min(ratios, key=lambda name: ratios[name]) if ratios else None


def _cell(result: Result) -> str:
    if result.measurement is None:
        return result.reason or ""
    low, high = result.measurement.spread
    return f"{result.measurement.ratio:.2f} ({low:.2f}-{high:.2f})"


def record_of(result: Result) -> dict[str, object]:
    """Return what the JSON holds of a result, with its median and quartiles; an error that is NaN is null."""
    record = asdict(result)
    record["error"] = result.error if np.isfinite(result.error) else None
    if result.measurement is not None:
        record["ratio"] = result.measurement.ratio
        record["quartiles"] = result.measurement.spread
    return record
