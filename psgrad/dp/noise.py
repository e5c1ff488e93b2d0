"""Gaussian noise: from where it is seeded, and to what it is scaled."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from psgrad.dp.streams import WORDS, is_known, stream
from psgrad.errors import ConfigError

__all__ = ["add_gaussian_noise", "noise_generator"]


def noise_generator(device: torch.device | str = "cpu", seed: int | None = None) -> torch.Generator:
    """Return a generator for noise.

    Parameters
    ----------
    device
        Where the noise will be drawn.
    seed
        None to seed from the operating system's cryptographic source: the only choice that is private.
        A number makes runs repeatable; whoever knows it can subtract the noise.

    Guarantees
    ----------
    Without a seed, a generator on the CPU begins in one of 2**19937 states of its Mersenne twister, drawn
    from the operating system, and one on CUDA (Philox) with 63 bits from there. With a seed, the CPU's has
    2**32 streams: PyTorch takes the lowest 32 bits. Neither generator is cryptographic, and floating-point
    Gaussian noise has the side channel of Mironov (2012), "On Significance of the Least Significant Bits for
    Differential Privacy": neither is defended against.

    Raises
    ------
    ConfigError
        Without a seed on the CPU, if this PyTorch keeps a generator's state in a way that is not known.

    """
    if seed is not None:
        return torch.Generator(device).manual_seed(seed)
    if torch.device(device).type != "cpu":
        return torch.Generator(device).manual_seed(secrets.randbits(63))
    if not is_known():
        raise ConfigError(
            f"PyTorch {torch.__version__} keeps the state of a generator in a way that is not known, and its"
            " seeds have 32 bits, which can be tried out: give a torch.Generator of your own"
        )
    words = torch.frombuffer(bytearray(secrets.token_bytes(4 * WORDS)), dtype=torch.uint32)
    return stream(words.to(torch.int64))


def add_gaussian_noise(
    parameters: Iterable[nn.Parameter], noise_multiplier: float, l2_bound: float, generator: torch.Generator
) -> None:
    """Add independent Gaussian noise of standard deviation `noise_multiplier * l2_bound` to every `.grad`.

    Parameters
    ----------
    parameters
        Those the bound covers. A `.grad` of None counts as 0 and becomes noise.
    noise_multiplier
        Standard deviation in units of the bound, 0 or more.
    l2_bound
        The most that one sample can change the sum in `.grad` by (`ClipResult.l2_bound`), finite.
    generator
        From `noise_generator`. On the CPU the noise of large parameters comes from streams of their own, each
        begun in a whole state that this one draws, by as many threads as PyTorch has; how many does not
        matter to it.

    Raises
    ------
    ConfigError
        If the noise multiplier or the bound is out of range.

    """
    if not noise_multiplier >= 0:
        raise ConfigError(f"noise_multiplier must be 0 or more, got {noise_multiplier}")
    if noise_multiplier and not 0 < l2_bound < float("inf"):
        raise ConfigError(f"noise needs a finite bound on one sample's influence, got {l2_bound}")
    std = noise_multiplier * l2_bound if noise_multiplier else 0.0
    large: list[Tensor] = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        flat = _in_one_piece(p.grad) if std and generator.device.type == "cpu" and is_known() else None
        if flat is not None:
            large += flat.split(CHUNK)
        elif std:
            p.grad += _noise(p.grad, std, generator)
    if large:
        _add_by_threads(large, std, generator)


CHUNK = 2**18
"""Elements that a stream makes noise for: a millisecond, many times what it takes to begin one."""


def _in_one_piece(grad: Tensor) -> Tensor | None:
    """Return all elements of a large gradient on the CPU as a vector that shares its memory, or None."""
    if grad.numel() <= CHUNK or grad.device.type != "cpu":
        return None
    if grad.ndim > 1 and not grad.is_contiguous():
        grad = grad.movedim(1, -1)  # as channels_last has it
    return grad.view(-1) if grad.is_contiguous() else None


def _noise(like: Tensor, std: float, generator: torch.Generator, memory: Tensor | None = None) -> Tensor:
    """Noise of a shape, dtype and device, drawn in float32 at least; in `memory` if that is long enough."""
    if memory is None:
        memory = torch.empty(like.numel(), dtype=_drawn_in(like), device=like.device)
    drawn = memory[: like.numel()].normal_(0.0, std, generator=generator)
    return drawn.view(like.shape).to(like.dtype)


def _drawn_in(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _add_by_threads(parts: Sequence[Tensor], std: float, generator: torch.Generator) -> None:
    """Add noise to vectors, each from a stream of its own: PyTorch's generator draws in one thread."""
    states = torch.randint(2**32, (len(parts), WORDS), generator=generator)
    threads = torch.get_num_threads()

    def add(first: int) -> None:
        memory: dict[torch.dtype, Tensor] = {}
        for part, words in zip(parts[first::threads], states[first::threads], strict=True):
            dtype = _drawn_in(part)
            if dtype not in memory:
                memory[dtype] = torch.empty(CHUNK, dtype=dtype)
            part += _noise(part, std, stream(words), memory[dtype])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(torch.no_grad()(add), range(threads)))
