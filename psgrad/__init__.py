"""psgrad: per-sample gradients in PyTorch, exact and fast, convolutions first."""

from psgrad.clipping import ClipPerSample, ClipResult, check_loss_reduction, clip_per_sample
from psgrad.errors import (
    CaptureError,
    ConfigError,
    MemberError,
    PsgradError,
    RefusedModelError,
    ShapeError,
    StrategyError,
)
from psgrad.freed_memory import keep_freed_memory
from psgrad.grad_norms import GradNorms
from psgrad.independence import check_rows_independent
from psgrad.per_sample import PerSampleGrads

__all__ = [
    "CaptureError",
    "ClipPerSample",
    "ClipResult",
    "ConfigError",
    "GradNorms",
    "MemberError",
    "PerSampleGrads",
    "PsgradError",
    "RefusedModelError",
    "ShapeError",
    "StrategyError",
    "check_loss_reduction",
    "check_rows_independent",
    "clip_per_sample",
    "keep_freed_memory",
]
