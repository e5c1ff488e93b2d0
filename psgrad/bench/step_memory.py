"""Peak memory of a training step with clipping, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from psgrad.bench.process_memory import peak_of_steps
from psgrad.bench.step_models import MODELS
from psgrad.bench.step_peers import STEPPERS, NonPrivate, Stepper

__all__ = ["FLOOR", "largest_batch", "peak_memory"]

FLOOR = ""
"""Name of the non-private step, where a contender's is asked for."""

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
    return peak_of_steps(
        partial(_step, model, contender, batch_size, device), preload=__name__, device=device, timeout=timeout
    )


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


def _step(model: str, contender: str, batch_size: int, device: str) -> Callable[[], object]:
    """Run in the child: build model, data and stepper, and return a step."""
    net = MODELS[model].seeded().to(device)
    x, y = (t.to(device) for t in MODELS[model].batch(batch_size))
    stepper: Stepper = (
        NonPrivate(net) if contender == FLOOR else STEPPERS[contender](net, MAX_NORM, batch_size)
    )
    return partial(stepper.step, x, y)
