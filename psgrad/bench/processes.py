"""Where fresh processes come from: a server that has the imports done, so that they take no time."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

__all__ = ["fresh_processes"]


def fresh_processes(preload: str) -> ForkServerContext:
    """Return the context whose processes are forked from one that has imported a module, and is unused.

    So are the modules beside the program that it has imported: every process imports the program again.
    Preloading holds for the first process of a program; later ones come from the same server.
    """
    context = multiprocessing.get_context("forkserver")
    package = getattr(sys.modules["__main__"], "__package__", None)
    beside = [name for name in sys.modules if package and name.startswith(f"{package}.")]
    context.set_forkserver_preload([preload, *beside])
    return context
