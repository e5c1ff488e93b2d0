"""One random stream a member, so that dropout draws what the member would draw alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["MemberRandomness", "given_back", "without_trace"]


@contextmanager
def given_back() -> Iterator[None]:
    """Leave PyTorch's random states, CPU and CUDA, as they were found."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def without_trace(module: nn.Module, randomness: MemberRandomness) -> Iterator[None]:
    """Put a module's buffers and the members' streams back afterwards.

    A `torch.utils.checkpoint` around it does not see what is saved for a backward pass inside.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = list(randomness.states)
    try:
        with saved_tensors_hooks(Tensor.detach, lambda t: t):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        randomness.set_states(states)


class MemberRandomness:
    """K random states, each of one member's own CPU stream.

    Parameters
    ----------
    states
        K states as `torch.get_rng_state` gives them.

    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.generators = [torch.Generator() for _ in states]
        self.set_states(states)

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Put every member's stream to a state."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state.clone())  # PyTorch 2.15 reads a view's state from its base

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> MemberRandomness:
        """Streams that begin as after `torch.manual_seed(seed)`."""
        return cls([torch.Generator().manual_seed(seed).get_state() for seed in seeds])

    @property
    def states(self) -> Tensor:
        """`[K, bytes]` uint8: where every member's stream is."""
        return torch.stack([generator.get_state() for generator in self.generators])

    @contextmanager
    def of(self, k: int) -> Iterator[None]:
        """Inside, the global CPU stream is that of member k, which goes on from there afterwards."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.generators[k].get_state())
        try:
            yield
        finally:
            self.generators[k].set_state(torch.get_rng_state())
            torch.set_rng_state(outside)

    def __reduce__(self) -> tuple[Any, ...]:
        return MemberRandomness, (list(self.states),)
