"""The strategies, one file each, and the table that names them."""

from psgrad.conv.strategies.base import Cost, Strategy, Verb
from psgrad.conv.strategies.correlate import Correlate
from psgrad.conv.strategies.gram import Gram
from psgrad.conv.strategies.grouped import Grouped
from psgrad.conv.strategies.loop import Loop
from psgrad.conv.strategies.triton import Triton
from psgrad.conv.strategies.unfold import Unfold

__all__ = ["STRATEGIES", "Cost", "Strategy", "Verb"]

STRATEGIES: dict[str, Strategy] = {
    "loop": Loop(),
    "grouped": Grouped(),
    "unfold": Unfold(),
    "correlate": Correlate(),
    "gram": Gram(),
    "triton": Triton(),
}
"""Every strategy by name. A new one is a file and a line here."""
