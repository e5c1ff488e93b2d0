"""Where backward passes start: `torch.autograd.backward` and `grad`, wrapped for as long as somebody looks.

The graph does not say inside of a backward pass which loss it is of, and what the loss has saved is freed
by then; so it is looked at before. `Tensor.backward` calls `torch.autograd.backward` by this name. While
nobody looks, it is torch's own.

Nor does the graph lead to parameters whose gradients are computed beside it: a backward pass that is to reach
them alone (`inputs=`) is led to where they are computed, and `torch.autograd.grad`, which would return a part
of them or nothing, is refused.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from psgrad.errors import CaptureError
from psgrad.graph import leaves_of

__all__ = ["Leads", "follow_inputs", "unfollow_inputs", "unwatch", "watch"]

BETWEEN = ("retain_graph", "create_graph", "grad_variables")
"""Arguments of `torch.autograd.backward` before `inputs`, after the gradients."""

Look = Callable[[list[Tensor]], None]


class Leads(Protocol):
    """Who computes gradients that the graph does not lead to, at leaves that it does."""

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters, by path."""

    def leaves_for(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """Return the leaves by which a backward pass to `inputs` alone reaches theirs, or none.

        Raises
        ------
        CaptureError
            If it cannot do with these.

        """


_lock = threading.Lock()
_watching: weakref.WeakSet[Any] = weakref.WeakSet()
_leading: weakref.WeakSet[Any] = weakref.WeakSet()
_looks: list[Look] = []


def watch(who: object, look: Look) -> None:
    """Call `look`, the same for all, with the scalars of every backward pass that no gradient is given to.

    It ends with the last `unwatch(who)`, or with the last `who`.
    """
    with _lock:
        _looks[:] = [look]
        _add(_watching, who)


def follow_inputs(who: Leads) -> None:
    """Ask `who` at every backward pass that is given `inputs=`, until `unfollow_inputs(who)`."""
    with _lock:
        _add(_leading, who)


def unwatch(who: object) -> None:
    """Look no more. Twice is as good as once."""
    with _lock:
        _watching.discard(who)
        _restore_if_unwatched()


def unfollow_inputs(who: Leads) -> None:
    """Ask no more. Twice is as good as once."""
    with _lock:
        _leading.discard(who)
        _restore_if_unwatched()


def _add(who_all: weakref.WeakSet[Any], who: object) -> None:
    who_all.add(who)
    if not isinstance(torch.autograd.backward, _Backward):
        torch.autograd.backward = _Backward(torch.autograd.backward)
    if not isinstance(torch.autograd.grad, _Grad):
        torch.autograd.grad = _Grad(torch.autograd.grad)  # type: ignore[assignment]  # an overloaded one


def _restore_if_unwatched() -> None:
    """Give torch its functions back; where somebody else has wrapped ours, ours stay inside, and are idle."""
    if _watching or _leading:
        return
    if isinstance(torch.autograd.backward, _Backward):
        torch.autograd.backward = torch.autograd.backward.__wrapped__
    if isinstance(torch.autograd.grad, _Grad):
        torch.autograd.grad = torch.autograd.grad.__wrapped__  # type: ignore[assignment]  # the same


class _Backward:
    """`torch.autograd.backward`, looked at."""

    __wrapped__: Callable[..., None]

    def __init__(self, backward: Callable[..., None]) -> None:
        functools.update_wrapper(self, backward)
        # A compiled function that calls backward would have what runs in it compiled as well.
        self._run = torch.compiler.disable(self._look_and_run)

    def __call__(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        self._run(tensors, grad_tensors, *args, **kwargs)

    def _look_and_run(self, tensors: Any, grad_tensors: Any, *args: Any, **kwargs: Any) -> None:
        if not (_watching or _leading):
            with _lock:
                _restore_if_unwatched()  # the last who looked is gone
        if _watching:
            roots = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            given = grad_tensors if isinstance(grad_tensors, (list, tuple)) else [grad_tensors]
            if all(g is None for g in given) and all(isinstance(r, Tensor) and r.grad_fn for r in roots):
                _looks[0](list(roots))
        if len(args) > len(BETWEEN):
            args, kwargs["inputs"] = args[: len(BETWEEN)], args[len(BETWEEN)]
        if kwargs.get("inputs") is not None:
            inputs = _listed(kwargs["inputs"])
            added = [leaf for who in list(_leading) for leaf in who.leaves_for(inputs)]
            kwargs["inputs"] = [*inputs, *added]
        self.__wrapped__(tensors, grad_tensors, *args, **kwargs)


class _Grad:
    """`torch.autograd.grad`, refused for parameters whose gradients are computed beside the graph."""

    __wrapped__: Callable[..., tuple[Tensor, ...]]

    def __init__(self, grad: Callable[..., tuple[Tensor, ...]]) -> None:
        functools.update_wrapper(self, grad)

    def __call__(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if _leading and not torch.compiler.is_compiling():
            if isinstance(inputs, Iterator):
                inputs = list(inputs)  # to be looked at twice
            _refuse_captured(_listed(outputs), _listed(inputs))
        return self.__wrapped__(outputs, inputs, *args, **kwargs)


def _refuse_captured(outputs: list[Any], inputs: list[Any]) -> None:
    asked = {id(t) for t in inputs}
    for who in list(_leading):
        named = [name for name, p in who.trainable.items() if id(p) in asked]
        if not named:
            continue
        anchors = {id(leaf) for leaf in who.leaves_for(list(who.trainable.values()))}
        if any(id(leaf) in anchors for leaf in leaves_of(t for t in outputs if isinstance(t, Tensor))):
            more = f" and {len(named) - 1} more" if len(named) > 1 else ""
            raise CaptureError(
                f"torch.autograd.grad is asked for the gradient of {named[0]}{more}, which psgrad hands over "
                "in loss.backward(): call that, or remove() the handle before the forward pass"
            )


def _listed(tensors: Any) -> list[Any]:
    one = isinstance(tensors, (Tensor, torch.autograd.graph.GradientEdge))
    return [tensors] if one else list(tensors.values() if isinstance(tensors, dict) else tensors)
