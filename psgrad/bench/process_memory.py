"""Peak memory of a training step, in a process of its own.

On a GPU it is what PyTorch's allocator had handed out at most. On the CPU it is the growth of the process's
resident memory, from after the imports to the highest point of two steps: model, data, gradients,
activations, and the scratch space of the libraries.
"""

from __future__ import annotations

import gc
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from psgrad.bench.memory import CLEAR, STATUS, resident
from psgrad.bench.processes import fresh_processes
from psgrad.freed_memory import freed_memory_is_kept, keep_freed_memory

__all__ = ["peak_of_steps"]

STEPS = 2  # the first of an optimizer may allocate less

Build = Callable[[], Callable[[], object]]
"""Builds everything that a step needs, and returns what does one."""


def peak_of_steps(build: Build, *, preload: str, device: str = "cpu", timeout: float = 120.0) -> int | None:
    """Peak bytes of building and of two steps, in a fresh process.

    Parameters
    ----------
    build
        Called in that process; it is sent there, so it can be pickled.
    preload
        The module that `build` is from: its imports are done once, and counted for nobody.
    device
        "cpu" or "cuda".
    timeout
        Seconds after which the process is ended.

    Returns
    -------
    int | None
        None if the process failed, was killed for its memory, or took too long.

    """
    context = fresh_processes(preload)
    here, there = context.Pipe(duplex=False)
    args = there, build, device, freed_memory_is_kept()
    process = context.Process(target=_measure, args=args, daemon=True)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(timeout) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()
        here.close()


def _measure(connection: Connection, build: Build, device: str, keep: bool) -> None:
    """Run in the child: send the peak, or None; with freed memory kept as where times are measured."""
    if keep:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # the peers', once a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        before = _settle(device)
        step = build()
        for _ in range(STEPS):
            step()
        connection.send(max(1, _peak(device) - before))
    except Exception:  # whatever it is, this contender has no number; why is the gate's to say
        connection.send(None)


def _settle(device: str) -> int:
    """Bytes in use before anything is built, with the libraries awake."""
    images = torch.zeros(1, 1, 4, 4, device=device)
    torch.nn.functional.conv2d(images, torch.zeros(1, 1, 3, 3, device=device)).sum().item()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if CLEAR.exists():
        CLEAR.write_text("5")  # Linux: the highest point so far is forgotten
        return resident("VmRSS")
    return _peak(device)


def _peak(device: str) -> int:
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        return resident("VmHWM")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
