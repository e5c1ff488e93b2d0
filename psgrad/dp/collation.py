"""Batches without samples, in the form that a loader's own collation gives the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from psgrad.errors import ConfigError

__all__ = ["WithEmptyBatches"]


class WithEmptyBatches:
    """A collation that takes no samples as well: few can, and Poisson sampling asks for it.

    What depends on how many samples there are is seen from one sample, collated once and twice over: the
    first axis in which the tensors differ is the batch's (axis 0 if they do not), and a list that is longer
    has an entry a sample. Both are empty in an empty batch. Plain values stay as one sample has them:
    strings, numbers, None, tensors of no axis.

    Parameters
    ----------
    collate
        Of a loader.
    sample
        Any.

    Raises
    ------
    ConfigError
        When an empty batch is asked for, if a batch is of another type than tensors, mappings, sequences and
        plain values.

    """

    def __init__(self, collate: Callable[[list[Any]], Any], sample: Any) -> None:
        self._collate = collate
        self._once, self._twice = collate([sample]), collate([sample, sample])

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch of these samples, which may be none."""
        return self._collate(samples) if samples else _emptied(self._once, self._twice)


def _emptied(once: Any, twice: Any) -> Any:
    if isinstance(once, Tensor):
        lengths = zip(once.shape, twice.shape, strict=True)
        axis = next((axis for axis, (one, two) in enumerate(lengths) if one != two), 0)
        return once.narrow(axis, 0, 0).clone() if once.ndim else once.clone()
    if isinstance(once, Mapping):
        emptied = copy.copy(once)  # a BatchEncoding stays one
        emptied.update({key: _emptied(value, twice[key]) for key, value in once.items()})  # type: ignore[attr-defined]  # a mapping
        return emptied
    if once is None or isinstance(once, (str, bytes, int, float, complex)):
        return once
    if isinstance(once, Sequence):
        entries = [] if len(once) != len(twice) else list(map(_emptied, once, twice))
        make: Callable[..., Any] = type(once)
        return make(*entries) if hasattr(once, "_fields") else make(entries)
    raise ConfigError(
        f"the loader's collate_fn makes a {type(once).__name__}, and psgrad no empty one, for which Poisson "
        "sampling asks now and then: let it return tensors, or a mapping or sequence of them"
    )
