"""All about one convolution, nothing about training."""

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.planner import Plan, plan
from psgrad.conv.verbs import weight_grad_sq_norms, weight_grads, weighted_weight_grad

__all__ = [
    "ConvGeometry",
    "Plan",
    "plan",
    "weight_grad_sq_norms",
    "weight_grads",
    "weighted_weight_grad",
]
