"""`PerMember`: one hyperparameter of K members, with the arithmetic that schedules do on one number."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from psgrad.errors import ConfigError, MemberError

__all__ = ["Hyperparameter", "PerMember", "as_hyperparameter", "numbers_of", "simplest"]


class PerMember:
    """K numbers, one a member, that add, subtract, multiply, divide and raise elementwise.

    It stands where an optimizer has a float, above all as a group's `lr`. PyTorch's schedulers compute the
    next rate from the last or the first one with ordinary arithmetic, so each member's rate follows the
    schedule in Python's floats as it would alone, absolute settings such as `eta_min` included. A function
    given to `LambdaLR` may return a `PerMember`: then each member has a schedule of its own.

    It is immutable, compares by value, and `torch.load` with `weights_only=True` reads it.

    Raises
    ------
    ConfigError
        If a value is no real number.

    """

    def __init__(self, values: Sequence[float]) -> None:
        if not values or not all(isinstance(value, Real) for value in values):
            raise ConfigError(f"one real number a member is needed, got {values!r}")
        self.values = tuple(float(value) for value in values)

    def kept(self, indices: Sequence[int]) -> PerMember:
        """Return the values of these members, in this order."""
        return PerMember([self.values[k] for k in indices])

    def map(self, fn: Callable[[float], float]) -> PerMember:
        """Return `fn` of every value."""
        return PerMember([fn(value) for value in self.values])

    def _with(self, other: Any, operation: Callable[[float, float], float]) -> PerMember:
        if isinstance(other, PerMember):
            if len(other) != len(self):
                raise MemberError(f"values of {len(self)} and of {len(other)} members do not go together")
            return PerMember([operation(a, b) for a, b in zip(self.values, other.values, strict=True)])
        if isinstance(other, Real):
            return self.map(lambda value: operation(value, float(other)))
        return NotImplemented

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __getitem__(self, k: int) -> float:
        return self.values[k]

    def __add__(self, other: Any) -> PerMember:
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> PerMember:
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> PerMember:
        return self._with(other, operator.mul)

    def __truediv__(self, other: Any) -> PerMember:
        return self._with(other, operator.truediv)

    def __pow__(self, other: Any) -> PerMember:
        return self._with(other, operator.pow)

    def __rsub__(self, other: Any) -> PerMember:
        return self._with(other, lambda value, first: first - value)

    def __rtruediv__(self, other: Any) -> PerMember:
        return self._with(other, lambda value, first: first / value)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> PerMember:
        return self.map(operator.neg)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerMember) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)

    def __float__(self) -> float:
        raise TypeError(
            f"{self} is no single number: a schedule that needs one (ReduceLROnPlateau) does not serve"
            " members whose values differ"
        )

    def __format__(self, spec: str) -> str:
        return f"[{', '.join(format(value, spec) for value in self.values)}]"

    def __repr__(self) -> str:
        return f"PerMember({list(self.values)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PerMember, (list(self.values),)


torch.serialization.add_safe_globals([PerMember])

Hyperparameter = float | PerMember
"""One number for all members, or one for each."""


def as_hyperparameter(name: str, value: Any, members: int) -> Hyperparameter:
    """Return a float as it is, K numbers as `PerMember`.

    Raises
    ------
    ConfigError
        If it is neither a number nor K of them; `name` is in the message.

    """
    if type(value) is float:  # nearly always, and in every step
        return value
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, PerMember | list | tuple):
        found = PerMember(list(value)) if len(value) == members else None
        if found is not None:
            return found
        raise ConfigError(
            f"{name} has {len(value)} values, the optimizer {members} members; if members were dropped, give"
            " keep the schedulers too"
        )
    raise ConfigError(f"{name} must be a number or one a member, got {value!r}")


def numbers_of(value: Hyperparameter) -> tuple[float, ...]:
    """Return the numbers, to be checked."""
    return value.values if isinstance(value, PerMember) else (value,)


def simplest(value: Any) -> Any:
    """Return a number in place of one a member where there is one member; of a tuple, each of its values.

    Several members with the same number stay apart: a kernel that rounds otherwise must not be chosen for
    one because of what another's number is.
    """
    if isinstance(value, tuple):
        return tuple(map(simplest, value))
    return value[0] if isinstance(value, PerMember) and len(value) == 1 else value
