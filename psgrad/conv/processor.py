"""Which CPU this is, and how long its vectors are: what a backend has kernels for, and how fast they run."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Processor", "halves_long_vectors", "mkl_is_slow", "processor", "short_vectors"]

CPUINFO = Path("/proc/cpuinfo")


class Processor(NamedTuple):
    """A CPU as PyTorch uses it.

    Attributes
    ----------
    vendor
        "AuthenticAMD", "GenuineIntel", ...; empty where the system does not say.
    name
        The maker's, which several generations may share in a virtual machine.
    version
        Family and model, which tell those apart; empty where the system does not say.
    instructions
        PyTorch's vector instructions, as "AVX2" or "AVX512".

    """

    vendor: str
    name: str
    version: str
    instructions: str


@lru_cache(maxsize=1)
def processor() -> Processor:
    """Return the CPU of this machine."""
    found: dict[str, str] = {}
    for line in _cpuinfo().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or "unknown"
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    instructions = torch.backends.cpu.get_cpu_capability()
    return Processor(found.get("vendor_id", ""), name, ", ".join(numbers), instructions)


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(errors="replace")
    except OSError:  # not Linux, or a sandbox that hides it
        return ""


def short_vectors() -> bool:
    """Whether PyTorch runs with vectors of 8 floats (AVX2), not 16 (AVX-512)."""
    return processor().instructions == "AVX2"


def mkl_is_slow() -> bool:
    """Whether oneDNN multiplies large float32 matrices faster than MKL, by which PyTorch does.

    With another maker's processor MKL stays with 8 floats where 16 would fit, which oneDNN uses.
    """
    cpu, libraries = processor(), (torch.backends.mkl, torch.backends.mkldnn)
    there = all(library.is_available() for library in libraries)
    return there and cpu.vendor == "AuthenticAMD" and cpu.instructions == "AVX512"


def halves_long_vectors() -> bool:
    """Whether this CPU (AMD's Zen 4) takes 16 floats as two halves, so that 8 at a time are as fast."""
    cpu = processor()
    return cpu.instructions == "AVX512" and cpu.version.startswith("cpu family 25,")
