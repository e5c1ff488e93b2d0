"""Clipping styles: which parameters share a norm, and how long a gradient may be.

A style is frozen and knows nothing of a backward pass. It splits the trainable parameters into groups,
each with its own bound; the clipped sum's L2 sensitivity follows from the bounds alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psgrad.clipping.factors import automatic_factors, clip_factors
from psgrad.errors import ConfigError

__all__ = ["Automatic", "ClippingStyle", "Flat", "Group", "PerLayer", "checked_norm", "l2_bound"]


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped by their common norm.

    Attributes
    ----------
    path
        Of the module they belong to; "" for all of the model.
    names
        The parameters' own paths.
    max_norm
        The longest that a sample's clipped gradient of these parameters is.

    """

    path: str
    names: tuple[str, ...]
    max_norm: float


def l2_bound(groups: Sequence[Group]) -> float:
    """Return sqrt(sum of the groups' squared bounds): one sample's most in a clipped sum, add or remove."""
    if len(groups) == 1:
        return groups[0].max_norm
    return math.sqrt(sum(group.max_norm**2 for group in groups))


class ClippingStyle(ABC):
    """How per-sample gradients are clipped. Frozen; `groups` and `factors` fix the sensitivity.

    Every style is a dataclass whose first field is `max_norm`.
    """

    max_norm: Any

    @abstractmethod
    def groups(self, names: Sequence[str]) -> tuple[Group, ...]:
        """Split the trainable parameters, by path, into groups; every one is in exactly one.

        Raises
        ------
        ConfigError
            If the style does not fit these parameters.

        """

    def factors(self, norms: Tensor, max_norm: float) -> Tensor:
        """Return what gradients of these norms `[N]` are multiplied by, `[N]`; 0 for one that is not finite.

        Guarantees `factors * norms <= max_norm (1 + 1e-6)`.
        """
        return clip_factors(norms, max_norm)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return the noise multiplier of the gradients, of a total that the accountant is told."""
        return noise_multiplier

    def after_step(self, unclipped: Tensor, generator: torch.Generator | None) -> ClippingStyle:
        """Return the style of the next logical step.

        Parameters
        ----------
        unclipped
            Scalar, `sum_n (b_n - 1/2)` over the step's samples, b_n = 1 for one within the bound.
        generator
            For noise, where the style needs some.

        """
        return self


@dataclass(frozen=True)
class Flat(ClippingStyle):
    """`g_n min(1, C / |g_n|)`, the norm over all parameters (Abadi et al. 2016, algorithm 1).

    Sensitivity of the clipped sum under add-or-remove-one: C.

    Attributes
    ----------
    max_norm
        C > 0. With inf gradients are the ordinary ones, exactly.

    """

    max_norm: float

    def __post_init__(self) -> None:
        checked_norm(self.max_norm)

    def groups(self, names: Sequence[str]) -> tuple[Group, ...]:
        """See `ClippingStyle.groups`: one."""
        return (Group("", tuple(names), float(self.max_norm)),)


@dataclass(frozen=True)
class PerLayer(ClippingStyle):
    """`g_nl min(1, C_l / |g_nl|)` for every layer l on its own (McMahan et al. 2018).

    Sensitivity of the clipped sum under add-or-remove-one: `sqrt(sum_l C_l^2)`.

    Attributes
    ----------
    max_norm
        A number C is shared out evenly, `C_l = C / sqrt(L)` over the L modules that own trainable
        parameters, so that the sensitivity is C. A mapping gives C_l by path of a module, or of a
        parameter: the longest path that a parameter's own begins with is its group, and "" takes the rest.

    """

    max_norm: float | Mapping[str, float]

    def __post_init__(self) -> None:
        if isinstance(self.max_norm, Mapping):
            if not self.max_norm:
                raise ConfigError("max_norm by path is empty: name a module, or give a number")
            for path, norm in self.max_norm.items():
                checked_norm(norm, f"max_norm of {path!r}")
        else:
            checked_norm(self.max_norm)

    def groups(self, names: Sequence[str]) -> tuple[Group, ...]:
        """See `ClippingStyle.groups`.

        Raises
        ------
        ConfigError
            If a path in the mapping owns no trainable parameter, or a parameter has no path.

        """
        members: dict[str, list[str]] = {}
        uncovered = []
        for name in names:
            path = self._group_of(name)
            if path is None:
                uncovered.append(name)
            else:
                members.setdefault(path, []).append(name)
        if uncovered:
            raise ConfigError(
                f"max_norm by path has no bound for {', '.join(uncovered)}: name a module they are in, "
                'or "" for all the rest'
            )
        if not isinstance(self.max_norm, Mapping):
            share = self.max_norm / math.sqrt(max(1, len(members)))
            return tuple(Group(path, tuple(own), share) for path, own in members.items())
        if idle := sorted(self.max_norm.keys() - members.keys()):
            raise ConfigError(
                f"max_norm names {', '.join(map(repr, idle))}, where no trainable parameter is left to clip; "
                f"trainable are {', '.join(names)}"
            )
        return tuple(Group(path, tuple(own), float(self.max_norm[path])) for path, own in members.items())

    def _group_of(self, name: str) -> str | None:
        if not isinstance(self.max_norm, Mapping):
            return name.rpartition(".")[0]
        fits = [path for path in self.max_norm if path in ("", name) or name.startswith(path + ".")]
        return max(fits, key=len, default=None)


@dataclass(frozen=True)
class Automatic(ClippingStyle):
    """AUTO-S: `g_n C / (|g_n| + gamma)`, every gradient brought to nearly C (Bu et al. 2023).

    Sensitivity of the clipped sum under add-or-remove-one: C.

    Attributes
    ----------
    max_norm
        C > 0, finite. It only scales the sum, so that it can be 1 and the learning rate do the rest.
    gamma
        Positive; the paper's 0.01 by default.

    """

    max_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        checked_norm(self.max_norm, finite=True)
        if not 0 < self.gamma < math.inf:
            raise ConfigError(f"gamma must be positive and finite, got {self.gamma}")

    def groups(self, names: Sequence[str]) -> tuple[Group, ...]:
        """See `ClippingStyle.groups`: one."""
        return (Group("", tuple(names), float(self.max_norm)),)

    def factors(self, norms: Tensor, max_norm: float) -> Tensor:
        """See `ClippingStyle.factors`."""
        return automatic_factors(norms, max_norm, self.gamma)


def checked_norm(max_norm: float, name: str = "max_norm", *, finite: bool = False) -> None:
    """Raise if this is no bound.

    Raises
    ------
    ConfigError
        As said.

    """
    if not isinstance(max_norm, (int, float)) or not max_norm > 0 or (finite and max_norm == math.inf):
        raise ConfigError(f"{name} must be positive{' and finite' if finite else ''}, got {max_norm}")
