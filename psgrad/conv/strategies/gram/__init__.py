"""`gram`: norms from Gram matrices. `strategy` chooses among the three ways to S."""

from psgrad.conv.strategies.gram.cancellation import eaten, norms_of_grams
from psgrad.conv.strategies.gram.strategy import Gram

__all__ = ["Gram", "eaten", "norms_of_grams"]
