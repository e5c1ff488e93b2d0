"""K models at once, each exactly as if it were alone."""

from psgrad.ensemble.ensemble import Ensemble
from psgrad.ensemble.loader import MemberLoader
from psgrad.ensemble.optim import SGD, Adam, AdamW, PerMember, clip_grad_norm_
from psgrad.ensemble.prediction import Prediction

__all__ = ["SGD", "Adam", "AdamW", "Ensemble", "MemberLoader", "PerMember", "Prediction", "clip_grad_norm_"]
