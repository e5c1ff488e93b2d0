"""Which inputs of a region are the batch: what trial runs with different numbers of samples tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Lengths", "RegionInputs"]

Lengths = Mapping[int, int]
"""By the position of an input among its call's leaves (`torch.utils._pytree`), the length of its axis 0."""


@dataclass
class _Trial:
    rows: int
    seen: dict[str, dict[int, set[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )  # lengths by path and position, over all calls


class RegionInputs:
    """Learned in trials of the whole model, that differ in the number of samples alone.

    An input is the batch if its axis 0 has the trial's rows in every trial. One that is of another length,
    but not of the same in all trials, holds the batch in an order that nothing tells (windows as rows, time
    first): the module cannot be cut into samples by its inputs, the one around it may be.
    """

    def __init__(self) -> None:
        self._trials: list[_Trial] = []
        self._whole: set[str] = set()

    def forget(self) -> None:
        """Start anew: other modules are regions now."""
        self._trials.clear()
        self._whole.clear()

    def begin(self, rows: int) -> None:
        """Begin a trial with so many rows."""
        self._trials.append(_Trial(rows))

    def see(self, path: str, lengths: Lengths) -> None:
        """Take in one call of a region in the present trial."""
        self._whole.discard(path)
        for position, length in lengths.items():
            self._trials[-1].seen[path][position].add(length)

    def ran_whole(self, path: str) -> None:
        """Take back that it is a region: the call ran on the batch as a whole, whatever its inputs are."""
        self._whole.add(path)

    def batched(self, path: str, lengths: Lengths, rows: int) -> set[int]:
        """Return the positions of a call's inputs that are the batch of so many rows."""
        known = [(trial.rows, trial.seen[path]) for trial in self._trials if path in trial.seen]
        return {
            position
            for position, length in lengths.items()
            if length == rows and all(rows in seen[position] for rows, seen in known)
        }

    def multiples(self) -> list[str]:
        """Regions with an input that was several times the rows of the last trial: maybe the batch's."""
        trial = self._trials[-1]
        return [
            path
            for path, by_position in self._regions(trial)
            if any(
                n > trial.rows and n % trial.rows == 0 for lengths in by_position.values() for n in lengths
            )
        ]

    def partly_batched(self) -> list[str]:
        """Regions of the last trial with one input that is the batch, and another that may be: time first."""
        trial = self._trials[-1]
        return [
            path
            for path, by_position in self._regions(trial)
            if {trial.rows} in by_position.values() and any(n != {trial.rows} for n in by_position.values())
        ]

    def grown(self) -> list[str]:
        """Regions with an input that grew from the first trial to the last, but not as the batch did."""
        first, last = self._trials[0], self._trials[-1]
        return [
            path
            for path, by_position in self._regions(first)
            if path in last.seen  # else it is inside of another region now
            and any(
                lengths != last.seen[path][position]
                and lengths ^ {first.rows} != last.seen[path][position] ^ {last.rows}
                for position, lengths in by_position.items()
            )
        ]

    def _regions(self, trial: _Trial) -> list[tuple[str, dict[int, set[int]]]]:
        return [(path, seen) for path, seen in trial.seen.items() if path not in self._whole]
