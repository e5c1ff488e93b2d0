"""K models at once, each exactly as if it were alone."""

from psgrad.ensemble.ensemble import Ensemble
from psgrad.ensemble.prediction import Prediction

__all__ = ["Ensemble", "Prediction"]
