"""Optimizers over stacked parameters: one step for K members, each with its own rates."""

from psgrad.ensemble.optim.adam import Adam, AdamW
from psgrad.ensemble.optim.clip import clip_grad_norm_
from psgrad.ensemble.optim.per_member import PerMember
from psgrad.ensemble.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "PerMember", "clip_grad_norm_"]
