"""A pytest plugin, `-p tests.interop.opacus_plugin`: Opacus's own tests run with psgrad in Opacus's tables.

Every convolution verb that psgrad computes is counted; a run without one fails, since it has shown nothing.
"""

from __future__ import annotations

import collections
import functools

import pytest

from psgrad.interop import opacus
from psgrad.layers import conv

VERBS = ("weight_grads", "weight_grad_sq_norms", "weighted_weight_grad")
calls: collections.Counter[str] = collections.Counter()


def counted(name, function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return wrapper


def pytest_configure():
    for name in VERBS:
        setattr(conv, name, counted(name, getattr(conv, name)))
    opacus.install()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if not calls["weight_grads"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    numbers = ", ".join(f"{name} {calls[name]}" for name in VERBS)
    terminalreporter.write_line(f"computed by psgrad: {numbers}")
