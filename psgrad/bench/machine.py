"""Where and with what numbers were measured."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from psgrad.conv.processor import processor
from psgrad.errors import ConfigError
from psgrad.freed_memory import freed_memory_is_kept

__all__ = ["describe", "require_device"]

PACKAGES = ("psgrad", "torch", "torchvision", "opacus", "backpack-for-pytorch")


def describe(device: str = "cpu") -> dict[str, str]:
    """Return the machine, the versions and the commit, each under a name; "unknown" where it is."""
    cpu = processor()
    return {
        "machine": torch.cuda.get_device_name(device) if device != "cpu" else cpu.name,
        "processor": ", ".join(filter(None, (cpu.version, cpu.instructions))),
        "cpu threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "freed memory": "kept (psgrad.keep_freed_memory)" if freed_memory_is_kept() else "given back",
        "commit": _commit(),
    }


def require_device(device: str) -> None:
    """Make sure that there is such a device before anything is measured on it.

    Raises
    ------
    ConfigError
        If it is "cuda", and PyTorch finds none.

    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda": PyTorch finds no CUDA device here; measure on "cpu"')


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """Hash of the checked-out commit, and whether the files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
