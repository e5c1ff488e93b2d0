"""Shadowing a module's `forward` on the instance, in a way that no copy of the module inherits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["ShadowForward", "is_shadowed", "replaced_forward", "shadow_forward", "unshadow_forward"]


class ShadowForward:
    """What shadows a module's `forward`: calls `run(forward, args, kwargs)` instead."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module = module
        self.run = torch.compiler.disable(  # a compiled caller breaks its graph here
            run,
            reason=f"psgrad is attached to this {type(module).__name__} and runs it without compiling it: "
            "compile without fullgraph=True, or give fullgraph=True to what holds no trainable parameter",
        )
        self.__wrapped__ = module.forward  # whose signature `inspect` finds, as of what decorators return

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what shadows."""
        return self.run(self.__wrapped__, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # copy and pickle run this before the copy has its state: there, the class's forward is found.
        return getattr, (self.module, "forward")


def shadow_forward(module: nn.Module, run: Callable[..., Any]) -> None:
    """Shadow `module.forward`, which may be shadowed already, with `run(forward, args, kwargs)`."""
    module.__dict__["forward"] = ShadowForward(module, run)


def is_shadowed(module: nn.Module) -> bool:
    """Whether a forward of psgrad's shadows the module's."""
    return isinstance(module.__dict__.get("forward"), ShadowForward)


def replaced_forward(module: nn.Module) -> Any | None:
    """Return what the module's forward was replaced with on the instance, None where it is the class's.

    A copy that was made under a handle holds the class's own, as `ShadowForward` leaves it.
    """
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__self__", None) is module
    return None if own and getattr(forward, "__func__", None) is type(module).forward else forward


def unshadow_forward(module: nn.Module) -> None:
    """Give the module its class's forward back."""
    module.__dict__.pop("forward", None)
