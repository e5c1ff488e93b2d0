"""The members shared out between processes of one thread each, every one a plain loop over its own.

The processes live as long as the fit does, so that starting them is in no step. They wait in a pipe, which
costs the others no time, and end when it is closed: also when whoever started them was killed.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.bench.ensemble_fits import Fit, loop
from psgrad.bench.processes import fresh_processes
from psgrad.errors import ConfigError, PsgradError
from psgrad.freed_memory import freed_memory_is_kept, keep_freed_memory

__all__ = ["PROCESSES", "shares", "two_processes"]

PROCESSES = 2
PRELOAD = "psgrad.bench.ensemble"
"""Whoever measures time with these processes also measures memory in others, from the same server."""


def shares(members: int) -> list[range]:
    """Members of each process, as even as they go.

    Raises
    ------
    ConfigError
        If there are fewer members than processes.

    """
    if members < PROCESSES:
        raise ConfigError(f"{members} member for {PROCESSES} processes")
    cuts = [members * i // PROCESSES for i in range(PROCESSES + 1)]
    return [range(start, end) for start, end in pairwise(cuts)]


def two_processes(models: Sequence[nn.Module]) -> Fit:
    """Fit members in two processes of one thread each, on the CPU.

    A step returns when both have done theirs. Data is sent when it is other than in the step before: as in
    a real run, where every process loads its own, passing it on is in no step.

    Raises
    ------
    ConfigError
        If there are fewer than two members, or they are not on the CPU.
    PsgradError
        In a step, if a process failed or ended.

    """
    if any(p.device.type != "cpu" for model in models for p in model.parameters()):
        raise ConfigError("processes of one thread each are for the CPU")
    workers: list[_Worker] = []
    try:
        workers += [_Worker([models[k] for k in share]) for share in shares(len(models))]
    except BaseException:
        _close(workers)
        raise
    where = [(worker, i) for worker, share in zip(workers, shares(len(models)), strict=True) for i in share]
    sent: list[Tensor] = []

    def step(x: Tensor, y: Tensor) -> None:
        if not sent or sent[0] is not x or sent[1] is not y:
            sent[:] = [x, y]
            for worker, share in zip(workers, shares(len(models)), strict=True):
                worker.ask("data", x[share.start : share.stop].clone(), y[share.start : share.stop].clone())
            for worker in workers:
                worker.answer()
        for worker in workers:
            worker.ask("step")
        for worker in workers:
            worker.answer()

    def parameters(k: int) -> list[Tensor]:
        worker = where[k][0]
        worker.ask("parameters", k - next(i for w, i in where if w is worker))
        found: list[Tensor] = worker.answer()
        return found

    return Fit(step, parameters, lambda: _close(workers))


class _Worker:
    """A process with some of the members."""

    def __init__(self, models: list[nn.Module]) -> None:
        context = fresh_processes(PRELOAD)
        self._here, there = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(there, freed_memory_is_kept()), daemon=True
        )
        try:
            self._process.start()
            there.close()
            self.ask("models", models)
            self.answer()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, *about: Any) -> None:
        try:
            self._here.send((what, *about))
        except OSError as err:
            raise PsgradError("a process that fits members has ended") from err

    def answer(self) -> Any:
        try:
            right, found = self._here.recv()
        except (EOFError, OSError) as err:
            raise PsgradError("a process that fits members has ended") from err
        if not right:
            raise PsgradError(f"a process that fits members failed: {found}")
        return found

    def close(self) -> None:
        self._here.close()
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


def _close(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.close()


def _work(connection: Connection, keep_freed: bool) -> None:
    """Run in the process: answer until the pipe is closed."""
    if keep_freed:
        keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)
    fit: Fit | None = None
    data: tuple[Tensor, ...] = ()
    while True:
        try:
            what, *about = connection.recv()
        except (EOFError, OSError):
            return
        found: object = None
        try:
            match what:
                case "models":  # copied, out of the memory that processes share
                    fit = loop(copy.deepcopy(about[0]))
                case "data":
                    data = tuple(tensor.clone() for tensor in about)
                case "step":
                    assert fit is not None
                    fit.step(*data)
                case "parameters":
                    assert fit is not None
                    found = [p.detach().clone() for p in fit.parameters(about[0])]
            answer: tuple[bool, object] = True, found
        except Exception as err:  # said where the step was asked for
            answer = False, f"{type(err).__name__}: {err}"
        try:
            connection.send(answer)
        except OSError:  # nobody is there any more
            return
