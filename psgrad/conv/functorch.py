"""The batch rules under `torch.vmap` and `torch.func`, in place of PyTorch's own.

Three operators get a Python kernel for the dispatch key FuncTorchBatched. It unwraps the tensors at
the current vmap level, runs the rule with the key excluded (so that operators inside reach the next
level out) and wraps the results again.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, _is_functional_tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _ExcludeDispatchKeyGuard,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import (
    _add_batch_dim,
    _unwrap_batched,
    current_level,
    is_functorch_wrapped_tensor,
)
from torch.autograd import forward_ad

from psgrad.conv.choice import check_strategy
from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.rules.backward import backward
from psgrad.conv.rules.call import Call
from psgrad.conv.rules.forward import convolution
from psgrad.conv.rules.per_sample import per_sample_backward, per_sample_refusal
from psgrad.errors import StrategyError

__all__ = ["install_rules", "uninstall_rules", "use_rules"]

_KEY = "FuncTorchBatched"
_RULES = DispatchKeySet(DispatchKey.FuncTorchBatched)
_RULES_AND_LEVELS = _RULES.add(DispatchKey.FuncTorchDynamicLayerBackMode)
_KEPT_KERNELS = 3 * 256
_PLAIN = (Tensor, torch.nn.Parameter)


class _Use:
    """One `use_rules` or `install_rules` that is in force; compared by identity."""

    def __init__(self, strategy: str, thread: int | None) -> None:
        self.strategy = strategy
        self.thread = thread


class _Registry:
    """The uses in force, oldest first, and the library that exists while there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: torch.library.Library | None = None
        self._uses: tuple[_Use, ...] = ()
        # A destroyed library frees its kernels, also one that a thread without a use of its own is
        # just running: the last ones are kept alive.
        self._kept: deque[object] = deque(maxlen=_KEPT_KERNELS)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._new_lock)

    def _new_lock(self) -> None:
        """In a forked process: another thread may have held the lock, and is not there to release it."""
        self._lock = threading.Lock()

    def enter(self, use: _Use) -> None:
        with self._lock:
            if self._library is None:
                library = _register()
                self._kept.extend(torch.library.get_kernel(f"aten::{name}", _KEY) for name in _KERNELS)
                self._library = library
            self._uses = (*self._uses, use)

    def leave(self, use: _Use) -> None:
        with self._lock:
            self._remove(use)

    def leave_last_installed(self) -> None:
        with self._lock:
            installed = [use for use in self._uses if use.thread is None]
            if not installed:
                raise StrategyError("uninstall_rules() without an install_rules() that it could undo")
            self._remove(installed[-1])

    def _remove(self, use: _Use) -> None:
        self._uses = tuple(other for other in self._uses if other is not use)
        if not self._uses and self._library is not None:
            self._library._destroy()
            self._library = None

    def strategy(self) -> str:
        """Return the strategy of this thread's innermost use, else of the newest use of all."""
        uses = self._uses  # replaced, never changed: no lock to read it
        if len(uses) > 1:
            here = threading.get_ident()
            for use in reversed(uses):
                if use.thread == here or use.thread is None:
                    return use.strategy
        return uses[-1].strategy if uses else "auto"


_REGISTRY = _Registry()


def install_rules(strategy: str = "auto") -> None:
    """Put the rules of `psgrad.conv` under `torch.vmap` and `torch.func` until `uninstall_rules`.

    See `use_rules`, which is this with an end. Each call needs an `uninstall_rules` of its own.

    Raises
    ------
    StrategyError
        If there is no such strategy.
    RuntimeError
        If called inside a function that `torch.compile` is tracing.

    """
    _refuse_while_compiling()
    check_strategy(strategy)
    _REGISTRY.enter(_Use(strategy, thread=None))


def uninstall_rules() -> None:
    """Undo the last `install_rules`; with the last use gone PyTorch's own rules are back.

    Raises
    ------
    StrategyError
        If there is none to undo.
    RuntimeError
        If called inside a function that `torch.compile` is tracing.

    """
    _refuse_while_compiling()
    _REGISTRY.leave_last_installed()


@contextmanager
def use_rules(strategy: str = "auto") -> Iterator[None]:
    """Let `torch.vmap` and `torch.func` run the rules of `psgrad.conv` for convolutions.

    `convolution` and `convolution_backward` under any vmap level run the functions of
    `psgrad.conv.rules`. In a backward pass of single samples (`vmap(grad(..))` over x, the weight
    shared) the weight gradient is computed by the strategy.

    Parameters
    ----------
    strategy
        "auto" for the planner's choice, which passes over strategies that refuse, "measure" to time them, or
        the name of one.

    Raises
    ------
    StrategyError
        On entry if there is no such strategy; inside, from the backward pass, if one was named and
        refuses the problem.
    RuntimeError
        On entry, inside a function that `torch.compile` is tracing.

    Notes
    -----
    *Where strategies are used.* Only on plain tensors whose gradients nobody records: see
    `psgrad.conv.rules.per_sample_refusal`. In the inner levels of nested vmaps, under an outer
    `grad`, or where a tensor with `requires_grad` comes from outside `torch.func` (detach parameters
    to avoid it), the general rules run instead, whatever the strategy: the numbers are the same, and
    differentiable. The outermost of nested vmaps may get a per-sample problem from the level inside,
    with more groups, and then the strategy serves that.

    *Nesting.* The inner strategy holds inside, the outer one afterwards. PyTorch's own rules are
    back when the last context is left, also by an exception.

    *Threads.* PyTorch has one table of kernels per process: while any thread uses the rules, every
    thread runs on them. Each thread follows its own innermost strategy; a thread without one (also
    autograd's own threads, for CUDA) follows the newest. Only speed depends on it, results do not.
    PyTorch does not lock its table against calls that are running: where threads vmap convolutions
    without a `use_rules` of their own, rather call `install_rules` once before they start.

    *torch.compile.* A compiled function may be called inside, and is traced with the rules; its
    graph keeps the rules it was traced with. The context itself cannot be entered by code that is
    being compiled.

    """
    _refuse_while_compiling()
    check_strategy(strategy)
    use = _Use(strategy, thread=threading.get_ident())
    _REGISTRY.enter(use)
    try:
        yield
    finally:
        _REGISTRY.leave(use)


def _refuse_while_compiling() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "the rules cannot be installed by code that torch.compile is tracing: registering a kernel"
            " changes PyTorch itself, not the graph. Enter use_rules() around the compiled function."
        )


def _register() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # PyTorch 2.11 warns of an override that was asked for.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for operator, kernel in _KERNELS.items():
            library.impl(operator, kernel, _KEY, allow_override=True)
    return library


@lru_cache(maxsize=1024)
def _geometry(
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
    output_padding: tuple[int, ...],
    groups: int,
) -> ConvGeometry:
    """Return our form of the operator's arguments."""
    return ConvGeometry(
        None, stride, padding, dilation, transposed, output_padding if transposed else 0, groups
    )


def _inside(*operands: Tensor) -> _ExcludeDispatchKeyGuard:
    """Return the block in which a rule runs, on operands without their `B`.

    In it an operator does not come back to the rules but goes on to the level outside of this vmap. Where
    plain PyTorch would only compute it goes to its backend directly: on the way through the levels, most of a
    rule's operators take longer than for what they do.
    """
    return _ExcludeDispatchKeyGuard(_RULES_AND_LEVELS if _computes_only(operands) else _RULES)


def _computes_only(operands: tuple[Tensor, ...]) -> bool:
    """Whether nobody outside of this vmap sees what is done with these: no mode, level, subclass or graph.

    Nor may a tensor's values be others than its memory holds: only the way through the levels minds that.
    """
    if _len_torch_dispatch_stack() or forward_ad._current_level >= 0 or _is_tracing():
        return False
    for t in operands:
        if type(t) not in _PLAIN or t.requires_grad or is_functorch_wrapped_tensor(t):
            return False
        if t.is_neg() or t._is_zerotensor() or _is_functional_tensor(t):
            return False
    return True


def _wrap(result: Tensor | None, bdim: int | None, level: int) -> Tensor | None:
    return result if result is None or bdim is None else _add_batch_dim(result, bdim, level)


def _convolution_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    level, call = current_level(), Call(stride, padding, dilation, transposed, output_padding, groups)
    x, x_bdim = _unwrap_batched(x, level)
    weight, weight_bdim = _unwrap_batched(weight, level)
    bias, bias_bdim = (None, None) if bias is None else _unwrap_batched(bias, level)
    with _inside(x, weight) if bias is None else _inside(x, weight, bias):
        return _wrap(*convolution(x, x_bdim, weight, weight_bdim, bias, bias_bdim, call), level)


def _convolution_with_flags_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *_flags: bool,
) -> Tensor | None:
    return _convolution_kernel(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _convolution_backward_kernel(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    level, call = current_level(), Call(stride, padding, dilation, transposed, output_padding, groups)
    grad_output, gbdim = _unwrap_batched(grad_output, level)
    x, xbdim = _unwrap_batched(x, level)
    weight, wbdim = _unwrap_batched(weight, level)
    with _inside(grad_output, x, weight):
        if not output_mask[1] or per_sample_refusal(grad_output, gbdim, x, xbdim, wbdim) is not None:
            grads = backward(grad_output, gbdim, x, xbdim, weight, wbdim, call, output_mask)
        else:
            geometry = _geometry(
                tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups
            )
            strategy = _REGISTRY.strategy()
            grads = per_sample_backward(
                grad_output, gbdim, x, xbdim, weight, wbdim, call, output_mask, geometry, strategy
            )
        grad_x, grad_weight, grad_bias = grads
        return _wrap(*grad_x, level), _wrap(*grad_weight, level), _wrap(*grad_bias, level)


_KERNELS = {
    "convolution": _convolution_kernel,
    "_convolution": _convolution_with_flags_kernel,
    "convolution_backward": _convolution_backward_kernel,
}
"""The Python kernel of every operator that the rules replace."""
