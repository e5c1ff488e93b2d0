"""`gram`: norms from Gram matrices. `strategy` asks, `shifted` and `mapped` are two ways to S."""

from psgrad.conv.strategies.gram.strategy import CANCELLATION, Gram

__all__ = ["CANCELLATION", "Gram"]
