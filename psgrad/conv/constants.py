"""Tensors that are made once and kept, for every later call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["as_it_is"]

P = ParamSpec("P")


def as_it_is(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a constant that is kept: of values, whatever mode is on when it is asked for first."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            return make(*args, **kwargs)

    return made
