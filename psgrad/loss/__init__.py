"""What a loss does with its batch: what was said of it, and what its graph shows."""

from psgrad.loss.called import judge_member_loss
from psgrad.loss.check import LossCheck
from psgrad.loss.reduction import LossReduction, checked_reduction

__all__ = ["LossCheck", "LossReduction", "checked_reduction", "judge_member_loss"]
