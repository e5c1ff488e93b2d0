"""Epsilon and noise multipliers, by the accountants of Opacus."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

from opacus.accountants import PRVAccountant, create_accountant
from opacus.accountants.accountant import IAccountant
from opacus.accountants.utils import get_noise_multiplier

from psgrad.errors import ConfigError

__all__ = ["PRVAccountant", "accountant_named", "epsilon_spent", "load_spent", "noise_multiplier_for"]


def accountant_named(mechanism: str) -> IAccountant:
    """Return a new accountant that has recorded nothing.

    Raises
    ------
    ConfigError
        If there is none of this name, or it is an approximation that can report less than is spent.

    """
    if mechanism == "gdp":
        raise ConfigError(
            'accountant="gdp" is an approximation that can report less than what is spent: use "prv"'
        )
    try:
        return create_accountant(mechanism=mechanism)
    except ValueError as err:
        raise ConfigError(f'accountant {mechanism!r}: there are "prv" and "rdp"') from err


def noise_multiplier_for(
    target_epsilon: float,
    target_delta: float,
    *,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
) -> float:
    """Return the smallest noise multiplier that keeps `steps` Poisson-sampled steps within the target.

    Parameters
    ----------
    target_epsilon
        Positive.
    target_delta
        Between 0 and 1; smaller than one over the number of samples to mean anything.
    sample_rate
        Probability q of each sample to be in a batch, in (0, 1].
    steps
        Number of steps, at least 1.
    accountant
        By which epsilon is bounded: "prv" (Gopi et al. 2021) or "rdp" (Mironov et al. 2019), whose bound is
        looser, so that it asks for more noise.

    Returns
    -------
    float
        In units of the clipping norm, with add-or-remove-one neighbours, to 0.01 in epsilon from below.

    Raises
    ------
    ConfigError
        If an argument is out of range or the target cannot be met.

    """
    if not target_epsilon > 0:
        raise ConfigError(f"target epsilon must be positive, got {target_epsilon}")
    if not 0 < target_delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, got {target_delta}")
    if not 0 < sample_rate <= 1:
        raise ConfigError(f"the sample rate must be in (0, 1], got {sample_rate}")
    if steps < 1:
        raise ConfigError(f"the number of steps must be at least 1, got {steps}")
    if accountant not in ("prv", "rdp"):
        raise ConfigError(f'accountant {accountant!r}: there are "prv" and "rdp"')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of log(0) at the ends of a grid, which the library handles
            return get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=accountant,
            )
    except ValueError as err:
        raise ConfigError(
            f"no noise multiplier reaches epsilon {target_epsilon} at delta {target_delta} in {steps} steps "
            f"with sample rate {sample_rate}: {err}"
        ) from err


def epsilon_spent(accountant: IAccountant, delta: float) -> float:
    """Return the epsilon of all steps so far at this delta: 0 before the first, inf if one had no noise."""
    if not len(accountant):
        return 0.0
    if not all(noise_multiplier for noise_multiplier, _, _ in accountant.history):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def load_spent(accountant: IAccountant, state: dict[str, Any]) -> None:
    """Load the steps that a checkpoint tells of, unless the accountant has recorded them and more.

    A script that goes back to its best weights, in the process that found them, has spent what came after
    them as well: they were looked at to choose.
    """
    saved, recorded = state.get("history", []), accountant.history
    n = len(saved)  # of (noise multiplier, sample rate, steps)
    contained = (
        0 < n <= len(recorded)
        and recorded[: n - 1] == saved[:-1]
        and recorded[n - 1][:2] == saved[-1][:2]
        and recorded[n - 1][2] >= saved[-1][2]
    )
    if not contained:
        accountant.load_state_dict(copy.deepcopy(state))  # Opacus's keeps the list, and counts on in it
