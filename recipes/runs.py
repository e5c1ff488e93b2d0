"""A run: its folder, with metrics as lines of JSON and a checkpoint that is never half written; Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from psgrad import ConfigError

__all__ = ["Interruptible", "RunFolder", "writable"]


def writable(folder: Path) -> Path:
    """Make a folder, if it is missing, before anything is computed that could not be kept there.

    Raises
    ------
    ConfigError
        If nothing can be written to it.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as err:
        raise ConfigError(f"nothing can be written to {folder}: {err}") from err
    return folder


class RunFolder:
    """A folder with `metrics.jsonl` and `checkpoint.pt`.

    Parameters
    ----------
    path
        The folder, made by `make`. None stands for `runs/<recipe>/<time>`.
    recipe
        Name of the recipe.
    resume
        Whether the folder holds a run that goes on; otherwise one that does is refused. None of a recipe
        whose runs cannot go on.

    Raises
    ------
    ConfigError
        If the folder holds another run, or none where one was to be resumed.

    """

    def __init__(self, path: Path | None, recipe: str, *, resume: bool | None = None) -> None:
        self.path = path or Path("runs") / recipe / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        if resume and not self.checkpoint.exists():
            raise ConfigError(f"nothing to resume: there is no {self.checkpoint}")
        if not resume and self.checkpoint.exists():
            hint = "" if resume is None else f", or go on with it by --resume {self.path}"
            raise ConfigError(f"{self.path} holds a run already: choose another --out{hint}")

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        """Where the metrics are."""
        return self.path / "metrics.jsonl"

    def make(self) -> None:
        """Make the folder.

        Raises
        ------
        ConfigError
            If nothing can be written to it.

        """
        writable(self.path)

    def log(self, **values: float | str) -> None:
        """Append one line of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def history(self, up_to_step: int) -> list[dict[str, float]]:
        """Return the metrics logged up to a step, and forget those after it (of a run that was lost)."""
        if not self.metrics.exists():
            return []
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        kept = [line for line in lines if line["step"] <= up_to_step]
        self.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, wholly or not at all."""
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def load(self) -> dict[str, Any]:
        """Read the checkpoint; tensors and plain values only.

        Raises
        ------
        ConfigError
            If it cannot be read.

        """
        try:
            return torch.load(self.checkpoint, weights_only=True)
        except Exception as err:  # torch.load raises what pickle, zipfile and itself raise
            raise ConfigError(f"{self.checkpoint} cannot be read: {err}") from err


class Interruptible:
    """While entered, the first Ctrl-C (or SIGTERM) only sets `.asked`; the second ends the program."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
