"""Freed memory stays with the process, and whether it does is said."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from psgrad import keep_freed_memory
from psgrad.bench import machine

STEP = """
import resource, torch
from psgrad import keep_freed_memory
from psgrad.bench import machine
print({keep} and keep_freed_memory())
print(machine.describe()["freed memory"])
def step():
    blocks = [torch.ones(3 * 2**20) for _ in range(8)]  # 12 MiB each
    large = torch.ones(16 * 2**20)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):  # until no block lies where another size is needed
    step()
before = faults()
step()
print(faults() - before)
"""

ON_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")


@ON_GLIBC
@pytest.mark.parametrize("keep", [True, False])
def test_later_steps_touch_no_new_page_where_freed_memory_is_kept(keep: bool) -> None:
    program = [sys.executable, "-c", STEP.format(keep=keep)]
    done = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    said, described, faults = done
    assert said == str(keep)
    assert described.startswith("kept" if keep else "given back")
    pages = 64 * 2**20 // 4096
    assert int(faults) < pages // 100 if keep else int(faults) > pages // 2


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    before = machine.describe()["freed memory"]
    assert keep_freed_memory() is False
    assert machine.describe()["freed memory"] == before
