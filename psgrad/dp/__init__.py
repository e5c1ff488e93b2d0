"""Training with differential privacy: noise, accounted steps, accounting."""

from psgrad.dp.accounting import PRVAccountant, epsilon_spent, noise_multiplier_for
from psgrad.dp.engine import PrivacyEngine
from psgrad.dp.noise import add_gaussian_noise, noise_generator
from psgrad.dp.optimizer import PrivateOptimizer

__all__ = [
    "PRVAccountant",
    "PrivacyEngine",
    "PrivateOptimizer",
    "add_gaussian_noise",
    "epsilon_spent",
    "noise_generator",
    "noise_multiplier_for",
]
