"""What the benchmark must show, computed from its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from psgrad.bench.peers import BenchVerb
from psgrad.bench.sweep import Cell, geometric_mean

__all__ = ["Line", "looks_like_a_miss", "misses", "verdict_lines"]

SMALL_RESULT = 32e6
FEW_POSITIONS = 256
SLOWER = 1.05
NEAR = {"auto": 1.10, "measure": 1.03}
"""How far from the best strategy a planner's choice may be, by mode."""


@dataclass(frozen=True)
class Line:
    """One requirement: what, its target in words, the number found, whether it holds (None: no target)."""

    what: str
    target: str
    found: str
    holds: bool | None


def looks_like_a_miss(cell: Cell) -> bool:
    """Whether a cell is one of those that a requirement counts against psgrad."""
    return bool(misses(cell))


def misses(cell: Cell) -> list[str]:
    """Say what a cell falls short of: slower than the best peer, or a choice that is not the best."""
    found = []
    peer = cell.best_peer
    slower = cell.quotient("auto", peer) if peer else None
    if slower is not None and slower > SLOWER:
        found.append(f"{slower:.2f}x the time of {peer}")
    for mode, near in NEAR.items():
        regret = cell.regret(mode)
        if regret is not None and regret > near:
            words = f"{mode} takes {cell.choices[mode]}, {regret:.2f}x the time of {cell.best_strategy}"
            found.append(words)
    return found


def verdict_lines(cells: Sequence[Cell]) -> list[Line]:
    """Return the requirements, each with what was found on these cells (of one dtype)."""
    small = [c for c in cells if c.verb == "grads" and _result_bytes(c) < SMALL_RESULT]
    few = [c for c in cells if c.verb == "sq_norms" and c.setting.case.positions <= FEW_POSITIONS]
    of = {verb: [c for c in cells if c.verb == verb] for verb in ("grads", "sq_norms", "weighted_sum")}
    lines = [
        _mean("grads / floor, results under 32 MB", _to_floor, small, most=1.5),
        _mean("grads / floor, all results", _to_floor, of["grads"]),
        _mean("grads: Opacus / psgrad", _to("opacus"), of["grads"], least=2.0),
        _mean("grads: torch.func / psgrad", _to("torch.func"), of["grads"], least=2.0),
        _never_slower("grads", of["grads"]),
        _mean(f"sq_norms / floor, T <= {FEW_POSITIONS}", _to_floor, few, most=0.4),
        _mean("sq_norms / floor, all", _to_floor, of["sq_norms"]),
        _never_slower("sq_norms", of["sq_norms"]),
        _mean("weighted_sum / floor", _to_floor, of["weighted_sum"]),
        _never_slower("weighted_sum", of["weighted_sum"]),
        *(
            _near(verb, mode, of[verb], least)
            for verb in ("grads", "sq_norms")
            for mode, least in (("auto", 0.95), ("measure", 1.0))
        ),
    ]
    return [line for line in lines if line is not None]


def _result_bytes(cell: Cell) -> int:
    return cell.setting.case.result_bytes(cell.setting.batch_size, cell.setting.itemsize)


def _to_floor(cell: Cell) -> float | None:
    return cell.measurements["auto"].ratio if "auto" in cell.measurements else None


def _to(peer: str) -> Callable[[Cell], float | None]:
    return lambda cell: cell.quotient(peer, "auto")


def _mean(
    what: str,
    number: Callable[[Cell], float | None],
    cells: Sequence[Cell],
    *,
    most: float | None = None,
    least: float | None = None,
) -> Line | None:
    values = [value for value in map(number, cells) if value is not None]
    if not values:
        return None
    mean = geometric_mean(values)
    target, holds = "", None
    if most is not None:
        target, holds = f"at most {most:g}x", mean <= most
    elif least is not None:
        target, holds = f"at least {least:g}x", mean >= least
    return Line(f"{what}, geometric mean", target, f"{mean:.2f}x ({len(values)} cases)", holds)


def _never_slower(verb: BenchVerb, cells: Sequence[Cell]) -> Line | None:
    quotients = [cell.quotient("auto", cell.best_peer) for cell in cells if cell.best_peer]
    values = [value for value in quotients if value is not None]
    if not values:
        return None
    slower = [value for value in values if value > SLOWER]
    worst = f", worst {max(slower):.2f}x" if slower else ""
    what = f"{verb}: cases slower than the best peer by more than 5 %"
    return Line(what, "0", f"{len(slower)} of {len(values)}{worst}", not slower)


def _near(verb: BenchVerb, mode: str, cells: Sequence[Cell], least: float) -> Line | None:
    values = [regret for cell in cells if (regret := cell.regret(mode)) is not None]
    if not values:
        return None
    share = sum(value <= NEAR[mode] for value in values) / len(values)
    what = f'{verb}: cases where "{mode}" is within {NEAR[mode] - 1:.0%} of the best strategy'
    found = f"{share:.1%} of {len(values)}, worst {max(values):.2f}x"
    return Line(what, f"{least:.0%}", found, share >= least)
