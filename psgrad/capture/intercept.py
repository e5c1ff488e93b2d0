"""What a region computes in its own way, found among everything that torch is called for in it."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from psgrad.capture.functions import FORMULAS, FUNCTIONS
from psgrad.capture.recurrent import RECURRENT

__all__ = ["Intercept", "Intercepted"]


class Intercepted(Protocol):
    """Who computes what was found."""

    def function(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """One of `psgrad.capture.functions.FUNCTIONS`."""

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """`F.scaled_dot_product_attention`."""

    def own(self, t: Tensor) -> Tensor:
        """A tensor that was made in order to write to it."""


class Intercept(TorchFunctionMode):
    """Send it to `region`."""

    def __init__(self, region: Intercepted) -> None:
        super().__init__()
        self._region = region

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            return self._region.function(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._region.attention(*args, **kwargs)
        if func in RECURRENT:
            return RECURRENT[func](self._linear, *args, **kwargs)
        if func in FORMULAS:
            with self:
                return FORMULAS[func](*args, **kwargs)
        if func in FACTORIES:
            return self._region.own(func(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, *args: Any) -> Tensor:
        return self._region.function(F.linear, args, {})


FACTORIES = frozenset(
    {
        torch.empty,
        torch.zeros,
        torch.empty_like,
        torch.zeros_like,
        Tensor.new_empty,
        Tensor.new_zeros,
    }
)
"""What makes a tensor in order to write to it."""


_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""torch's own code, without handing itself over to the mode: what it calls is what the mode must see."""
