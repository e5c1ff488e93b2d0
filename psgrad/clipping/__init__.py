"""Clipping per sample: styles, each with the bound that noise is scaled to, and the hook for any loop."""

from psgrad.clipping.adaptive import AdaptiveQuantile
from psgrad.clipping.factors import clip_factors
from psgrad.clipping.handle import ClipPerSample, clip_per_sample
from psgrad.clipping.reduction import check_loss_reduction
from psgrad.clipping.result import ClipResult, Gathered
from psgrad.clipping.styles import Automatic, ClippingStyle, Flat, Group, PerLayer
from psgrad.clipping.table import STYLES, as_style

__all__ = [
    "STYLES",
    "AdaptiveQuantile",
    "Automatic",
    "ClipPerSample",
    "ClipResult",
    "ClippingStyle",
    "Flat",
    "Gathered",
    "Group",
    "PerLayer",
    "as_style",
    "check_loss_reduction",
    "clip_factors",
    "clip_per_sample",
]
