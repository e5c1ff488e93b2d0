"""The report of the convolution benchmark: requirements first, then tables, pictures, what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from psgrad.bench.acceptance import misses, verdict_lines
from psgrad.bench.peers import BenchVerb
from psgrad.bench.report import require_extra
from psgrad.bench.sweep import Cell, DType
from psgrad.conv.planner import DeviceRates

__all__ = ["acceptance_table", "draw", "roofline_share", "write"]

FLOOR = "ordinary weight gradient"
LONGEST_REASON = 40
"""Letters of a reason in a table; the JSON has the whole."""
NOTE = f"""Each number is a time over the time of the layer's {FLOOR} in the same round, the median; the
quartiles stand in brackets. *psgrad* is the planner's own choice. Every contender was first compared
with a float64 loop; who is wrong, or cannot do it, has the reason instead. *Peak* is what one call of
psgrad adds to the process's memory, its result included. *Roofline* is the least time that the machine's
rates allow for the arithmetic of the {FLOOR} and for reading the operands and writing the result once,
over psgrad's time; norms that take a shorter way than that arithmetic can have more than 100 %. Cases
that looked like a miss were measured again, longer (*)."""


def write(
    cells: Sequence[Cell],
    folder: Path,
    *,
    about: Mapping[str, str],
    rates: Mapping[DType, DeviceRates],
    left_out: Mapping[str, str],
) -> None:
    """Write `bench.md`, `bench.json` and a picture for each verb and dtype into a folder, made if missing.

    Parameters
    ----------
    cells
        What was measured.
    folder
        Where to.
    about
        Machine, versions, commit.
    rates
        Of the machine, by dtype.
    left_out
        Settings that were not measured, and why.

    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Per-sample gradients of a convolution"]
    parts.append("\n".join(f"- {key}: {value}" for key, value in about.items()))
    parts += ["## What must be reached", acceptance_table(cells), _miss_list(cells)]
    parts += ["## Layer by layer", NOTE]
    for (verb, dtype), group in _groups(cells).items():
        picture = f"{verb}-{dtype}.png"
        draw(group, folder / picture, f"{verb}, {dtype}\n{about.get('machine', '')}")
        parts += [f"### {verb}, {dtype}", f"![{verb}, {dtype}]({picture})"]
        parts.append(_table(group, rates))
    if left_out:
        lines = [f"- {setting}: {reason}" for setting, reason in left_out.items()]
        parts += [f"## Left out ({len(left_out)})", "\n".join(lines)]
    (folder / "bench.md").write_text("\n\n".join(parts) + "\n")
    head = {
        "about": dict(about),
        "rates": {dtype: vars(r) for dtype, r in rates.items()},
        "left_out": dict(left_out),
    }
    rows = ",\n".join(json.dumps(_record(cell, rates), allow_nan=False) for cell in cells)
    (folder / "bench.json").write_text(f'{json.dumps(head)[:-1]}, "cells": [\n{rows}\n]}}\n')


def acceptance_table(cells: Sequence[Cell]) -> str:
    """Markdown: the requirements, a line for each dtype."""
    require_extra()
    from tabulate import tabulate

    rows = []
    for dtype in dict.fromkeys(cell.setting.dtype for cell in cells):
        for line in verdict_lines([cell for cell in cells if cell.setting.dtype == dtype]):
            holds = {True: "yes", False: "**no**", None: ""}[line.holds]
            rows.append([dtype, line.what, line.target, line.found, holds])
    return tabulate(rows, headers=["dtype", "what", "target", "found", "holds"], tablefmt="github")


def _miss_list(cells: Sequence[Cell]) -> str:
    lines = [
        f"- {cell.setting}, {cell.verb}: {'; '.join(found)}" for cell in cells if (found := misses(cell))
    ]
    return "Cases that fall short:\n\n" + "\n".join(lines) if lines else "No case falls short."


def roofline_share(cell: Cell, name: str, rates: Mapping[DType, DeviceRates]) -> float | None:
    """Least time that the rates allow over a contender's time; None if it has no number.

    The arithmetic is that of the ordinary weight gradient; moved are the operands and the verb's result.
    """
    measurement = cell.measurements.get(name)
    rate = rates.get(cell.setting.dtype)
    if measurement is None or rate is None:
        return None
    case, n, itemsize = cell.setting.case, cell.setting.batch_size, cell.setting.itemsize
    result = {
        "grads": case.result_bytes(n, itemsize),
        "sq_norms": 4 * n,
        "weighted_sum": case.result_bytes(1, itemsize),
    }[cell.verb]
    moved = case.operand_bytes(n, itemsize) + result
    return max(case.flops(n) / rate.flops, moved / rate.bytes) / measurement.least_seconds


def _table(cells: Sequence[Cell], rates: Mapping[DType, DeviceRates]) -> str:
    require_extra()
    from tabulate import tabulate

    others = [name for name in _contenders(cells) if name != "auto"]
    headers = ["network", "layer", "N", "psgrad", "over best peer", "peak MiB", "roofline", "auto", "measure"]
    rows = []
    for cell in cells:
        s, peer = cell.setting, cell.best_peer
        over = cell.quotient("auto", peer) if peer else None
        peak = cell.verdicts["auto"].peak_bytes if "auto" in cell.verdicts else None
        share = roofline_share(cell, "auto", rates)
        rows.append(
            [
                s.network,
                s.case.name,
                s.batch_size,
                _ratio(cell, "auto", spread=True) + (" *" if cell.repeated else ""),
                "" if over is None else f"{over:.2f} ({peer})",
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if share is None else f"{share:.0%}",
                cell.choices.get("auto", ""),
                cell.choices.get("measure", ""),
                *(_ratio(cell, name) for name in others),
            ]
        )
    return tabulate(rows, headers=[*headers, *others], tablefmt="github", disable_numparse=True)


def _ratio(cell: Cell, name: str, *, spread: bool = False) -> str:
    measurement = cell.measurements.get(name)
    if measurement is None:
        reason = cell.verdicts[name].reason or "" if name in cell.verdicts else ""
        return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."
    low, high = measurement.spread
    return f"{measurement.ratio:.2f}" + (f" ({low:.2f}-{high:.2f})" if spread else "")


def draw(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Draw who wins where: a row a layer, a panel a batch size, a column a contender, the least framed."""
    contenders = _contenders(cells)
    sizes = sorted({cell.setting.batch_size for cell in cells})
    layers = list(dict.fromkeys((cell.setting.network, cell.setting.case.name) for cell in cells))
    figure = Figure(
        figsize=(4 + 0.55 * len(contenders) * len(sizes), 2 + 0.24 * len(layers)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    image: Any = None
    for axes, n in zip(panels, sizes, strict=True):
        ratios = np.full((len(layers), len(contenders)), np.nan)
        for cell in cells:
            if cell.setting.batch_size != n:
                continue
            i = layers.index((cell.setting.network, cell.setting.case.name))
            least = min(cell.measurements, key=lambda name: cell.measurements[name].ratio, default=None)
            for j, name in enumerate(contenders):
                if name not in cell.measurements:
                    if name in cell.verdicts:
                        axes.text(j, i, "-", ha="center", va="center", fontsize=7, color="grey")
                    continue
                ratios[i, j] = ratio = cell.measurements[name].ratio
                color = "white" if abs(np.log2(ratio)) > 2.3 else "black"
                text = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
                bold = "bold" if name == least else "normal"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color, fontweight=bold)
                if name == least:
                    xs, ys = (j - 0.46, j + 0.46), (i - 0.44, i + 0.44)
                    axes.plot(
                        [xs[0], xs[1], xs[1], xs[0], xs[0]],
                        [ys[0], ys[0], ys[1], ys[1], ys[0]],
                        color="black",
                        lw=1,
                    )
        norm = TwoSlopeNorm(vcenter=0, vmin=-3, vmax=3)  # an eighth of the floor to eight times it
        image = axes.imshow(np.log2(ratios), cmap="RdYlGn_r", norm=norm, aspect="auto")
        axes.set_title(f"N = {n}", fontsize=9)
        axes.set_xticks(range(len(contenders)), contenders, rotation=60, ha="right", fontsize=7)
        first = axes is panels[0]
        axes.set_yticks(range(len(layers)), [f"{net}  {case}" for net, case in layers] if first else [])
        axes.tick_params(axis="y", labelsize=7)
        for i in range(1, len(layers)):
            if layers[i][0] != layers[i - 1][0]:
                axes.axhline(i - 0.5, color="black", lw=0.8)
    bar = figure.colorbar(image, ax=list(panels), ticks=range(-3, 4), aspect=40, pad=0.01)
    bar.ax.set_yticklabels([f"{2.0**t:g}x" for t in range(-3, 4)], fontsize=7)
    bar.set_label(f"time / {FLOOR}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _contenders(cells: Sequence[Cell]) -> list[str]:
    """Names in the order of the suites, without those that have no number anywhere."""
    measured = {name for cell in cells for name in cell.measurements}
    return [name for name in dict.fromkeys(n for cell in cells for n in cell.verdicts) if name in measured]


def _groups(cells: Sequence[Cell]) -> dict[tuple[BenchVerb, str], list[Cell]]:
    groups: dict[tuple[BenchVerb, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.verb, cell.setting.dtype), []).append(cell)
    return groups


def _record(cell: Cell, rates: Mapping[DType, DeviceRates]) -> dict[str, object]:
    s = cell.setting
    record: dict[str, object] = {"network": s.network, "layer": s.case.name, "batch_size": s.batch_size}
    record |= {"dtype": s.dtype, "verb": cell.verb, "choices": cell.choices, "repeated": cell.repeated}
    contenders = {}
    for name, verdict in cell.verdicts.items():
        entry: dict[str, object] = {
            "error": float(f"{verdict.error:.3g}") if isfinite(verdict.error) else None,
            "reason": verdict.reason,
            "peak_bytes": verdict.peak_bytes,
        }
        measurement = cell.measurements.get(name)
        if measurement is not None:
            share = roofline_share(cell, name, rates)
            numbers = {"ratio": measurement.ratio, "seconds": measurement.least_seconds}
            numbers |= dict(zip(("first_quartile", "third_quartile"), measurement.spread, strict=True))
            numbers |= {} if share is None else {"roofline": share}
            entry |= {key: float(f"{value:.4g}") for key, value in numbers.items()}
            entry["rounds"] = len(measurement.ratios)
        contenders[name] = entry
    return {**record, "contenders": contenders}
