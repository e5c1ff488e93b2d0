"""Other machines than the one at hand: for choices, and for which library makes products."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper

import pytest

from psgrad.conv import processor as module
from psgrad.conv.processor import Processor

INTEL = Processor("GenuineIntel", "an Intel CPU", "", "AVX512")
AMD = Processor("AuthenticAMD", "an AMD CPU", "", "AVX512")
AMD_HALVES = Processor("AuthenticAMD", "an AMD CPU", "cpu family 25, model 17", "AVX512")
AMD_AVX2 = Processor("AuthenticAMD", "an older AMD CPU", "", "AVX2")


@contextmanager
def on(cpu: Processor) -> Iterator[None]:
    """Inside, psgrad takes this for the CPU; nothing that was planned before or in there is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "processor", lambda: cpu)
        _forget()
        yield
    _forget()


def _forget() -> None:
    for name, owner in list(sys.modules.items()):
        if name.startswith("psgrad.conv"):
            for value in vars(owner).values():
                if type(value) is _lru_cache_wrapper:
                    value.cache_clear()
