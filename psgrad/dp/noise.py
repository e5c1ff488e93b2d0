"""Gaussian noise: from where it is seeded, and to what it is scaled."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import torch
from torch import nn

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
    Without a seed, no two generators share a stream but by a 64-bit collision. The stream itself is
    PyTorch's (Mersenne twister, Philox on CUDA), which is not cryptographic, and floating-point Gaussian
    noise has the side channel of Mironov (2012), "On Significance of the Least Significant Bits for
    Differential Privacy": neither is defended against.

    """
    generator = torch.Generator(device)
    generator.manual_seed(secrets.randbits(63) if seed is None else seed)
    return generator


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
        From `noise_generator`.

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
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if std:
            noise = torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            noise.normal_(0.0, std, generator=generator)
            p.grad += noise.to(p.dtype)
