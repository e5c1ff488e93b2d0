"""Peak memory of a training step, each in a process of its own, and the largest batch that fits.

On a GPU it is what PyTorch's allocator had handed out at most. On the CPU it is the growth of the process's
resident memory, from after the imports to the highest point of two steps: model, data, gradients,
activations, and the scratch space of the libraries.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from psgrad.bench.step_models import MODELS
from psgrad.bench.step_peers import STEPPERS, NonPrivate, Stepper

__all__ = ["FLOOR", "largest_batch", "peak_memory"]

FLOOR = ""
"""Name of the non-private step, where a contender's is asked for."""

STEPS = 2  # the first of an optimizer may allocate less
MAX_NORM = 1.0
LARGEST_SEARCHED = 8192


def peak_memory(
    model: str, contender: str, batch_size: int, *, device: str = "cpu", timeout: float = 120.0
) -> int | None:
    """Peak bytes of a step, measured in a fresh process.

    Parameters
    ----------
    model, contender
        Names in `MODELS` and `STEPPERS`; the contender may be `FLOOR`.
    batch_size
        N.
    device
        "cpu" or "cuda".
    timeout
        Seconds after which the process is ended.

    Returns
    -------
    int | None
        None if the process failed, was killed for its memory, or took too long.

    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once; every child is forked from there, unused
    here, there = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(there, model, contender, batch_size, device), daemon=True
    )
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


def largest_batch(fits: Callable[[int], bool], start: int = 16, most: int = LARGEST_SEARCHED) -> int | None:
    """Largest batch size that fits, to an eighth: doubled until one does not fit, then halved between.

    Parameters
    ----------
    fits
        Whether a step with N samples stays in the budget; if N does, smaller ones do.
    start
        First N; if it does not fit, smaller ones are tried.
    most
        Not more than this.

    Returns
    -------
    int | None
        None if not even one sample fits.

    """
    good, bad = 0, start
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    if bad > most:
        return good
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good or None


def _measure(connection: Connection, model: str, contender: str, batch_size: int, device: str) -> None:
    """Run in the child: send the peak, or None."""
    warnings.simplefilter("ignore")  # the peers', once a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        before = _settle(device)
        net = MODELS[model].seeded().to(device)
        x, y = (t.to(device) for t in MODELS[model].batch(batch_size))
        stepper: Stepper = (
            NonPrivate(net) if contender == FLOOR else STEPPERS[contender](net, MAX_NORM, batch_size)
        )
        del net
        for _ in range(STEPS):
            stepper.step(x, y)
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
    status = Path("/proc/self/clear_refs")
    if status.exists():
        status.write_text("5")  # Linux: the highest point so far is forgotten
        return _resident("VmRSS")
    return _peak(device)


def _peak(device: str) -> int:
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return _resident("VmHWM")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
