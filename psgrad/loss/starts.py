"""Where backward passes start: `torch.autograd.backward`, wrapped for as long as somebody looks.

The graph does not say inside of a backward pass which loss it is of, and what the loss has saved is freed
by then; so it is looked at before. `Tensor.backward` calls `torch.autograd.backward` by this name. While
nobody looks, it is torch's own.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["unwatch", "watch"]

Look = Callable[[list[Tensor]], None]

_lock = threading.Lock()
_watching: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(who: object, look: Look) -> None:
    """Call `look`, the same for all, with the scalars of every backward pass that no gradient is given to.

    It ends with the last `unwatch(who)`, or with the last `who`.
    """
    with _lock:
        _watching.add(who)
        if not isinstance(torch.autograd.backward, _Backward):
            torch.autograd.backward = _Backward(torch.autograd.backward, look)


def unwatch(who: object) -> None:
    """Look no more. Twice is as good as once."""
    with _lock:
        _watching.discard(who)
        _restore_if_unwatched()


def _restore_if_unwatched() -> None:
    """Give torch its function back; where somebody else has wrapped ours, ours stays inside, and is idle."""
    ours = torch.autograd.backward
    if not _watching and isinstance(ours, _Backward):
        torch.autograd.backward = ours.__wrapped__


class _Backward:
    """`torch.autograd.backward`, looked at."""

    __wrapped__: Callable[..., None]

    def __init__(self, backward: Callable[..., None], look: Look) -> None:
        functools.update_wrapper(self, backward)
        self._look = look
        # A compiled function that calls backward would have what runs in it compiled as well.
        self._run = torch.compiler.disable(self._look_and_run)

    def __call__(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        self._run(tensors, grad_tensors, *args, **kwargs)

    def _look_and_run(self, tensors: Any, grad_tensors: Any, *args: Any, **kwargs: Any) -> None:
        if _watching:
            roots = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            given = grad_tensors if isinstance(grad_tensors, (list, tuple)) else [grad_tensors]
            if all(g is None for g in given) and all(isinstance(r, Tensor) and r.grad_fn for r in roots):
                self._look(list(roots))
        else:
            with _lock:
                _restore_if_unwatched()  # the last who looked is gone
        self.__wrapped__(tensors, grad_tensors, *args, **kwargs)
