"""One random stream a member, so that dropout draws what the member would draw alone."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["GlobalStates", "MemberRandomness", "given_back", "put_back_after", "snapshot"]


class GlobalStates:
    """Of the generators that everybody draws from: PyTorch's on the CPU, Python's and NumPy's."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
        self._numpy = None if numpy is None else numpy.random
        self._state = None if self._numpy is None else self._numpy.get_state()

    def put_back(self) -> bool:
        """Put them where they were found; whether anything was drawn."""
        drawn = not torch.equal(self._torch, torch.get_rng_state()) or self._python != random.getstate()
        if self._numpy is not None:
            drawn |= pickle.dumps(self._state) != pickle.dumps(self._numpy.get_state())
            self._numpy.set_state(self._state)
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        return drawn


@contextmanager
def given_back() -> Iterator[None]:
    """Leave PyTorch's random states, CPU and CUDA, as they were found."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def snapshot(module: nn.Module, randomness: MemberRandomness) -> Callable[[], None]:
    """Remember a module's buffers and the members' streams; what is returned puts them back."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = list(randomness.states)

    def restore() -> None:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        randomness.set_states(states)

    return restore


@contextmanager
def put_back_after(module: nn.Module, randomness: MemberRandomness) -> Iterator[None]:
    """Put a module's buffers and the members' streams back afterwards.

    A `torch.utils.checkpoint` around it does not see what is saved for a backward pass inside.
    """
    restore = snapshot(module, randomness)
    try:
        with saved_tensors_hooks(Tensor.detach, lambda t: t):
            yield
    finally:
        restore()


class MemberRandomness:
    """K random states, each of one member's own CPU stream.

    Parameters
    ----------
    states
        K states as `torch.get_rng_state` gives them.

    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.set_states(states)

    def __len__(self) -> int:
        return len(self._states)

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Put every member's stream to a state."""
        self._states = [state.clone() for state in states]  # PyTorch 2.15 reads a view's state from its base

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> MemberRandomness:
        """Streams that begin as after `torch.manual_seed(seed)`."""
        return cls([torch.Generator().manual_seed(seed).get_state() for seed in seeds])

    @property
    def states(self) -> Tensor:
        """`[K, bytes]` uint8: where every member's stream is."""
        return torch.stack(self._states)

    def of(self, k: int) -> _Stream:
        """Inside, the global CPU stream is that of member k, which goes on from there afterwards."""
        return _Stream(self._states, k)

    def __reduce__(self) -> tuple[Any, ...]:
        return MemberRandomness, (list(self.states),)


class _Stream:
    """A block in which the global CPU stream is one of several, whose state is in a list."""

    def __init__(self, states: list[Tensor], k: int) -> None:
        self._states = states
        self._k = k

    def __enter__(self) -> None:
        everyone = torch.default_generator
        self._outside = everyone.get_state()
        everyone.set_state(self._states[self._k])

    def __exit__(self, *_: object) -> None:
        everyone = torch.default_generator
        self._states[self._k] = everyone.get_state()
        everyone.set_state(self._outside)
