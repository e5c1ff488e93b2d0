"""All about one convolution, nothing about training."""

from psgrad.conv.choice import plan
from psgrad.conv.functorch import install_rules, uninstall_rules, use_rules
from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.planner import Plan
from psgrad.conv.rules import (
    compute_grad_bias,
    convolution_backward_batch_rule,
    convolution_backward_input_batch_rule,
    convolution_backward_weight_batch_rule,
    convolution_batch_rule,
    cudnn_conv_per_sample_grad_rule,
    slow_fallback,
)
from psgrad.conv.verbs import (
    clipping_keeps_grads,
    kept_weight_grads,
    weight_grad_sq_norms,
    weight_grad_sq_norms_and_sum,
    weight_grads,
    weighted_weight_grad,
)

__all__ = [
    "ConvGeometry",
    "Plan",
    "clipping_keeps_grads",
    "compute_grad_bias",
    "convolution_backward_batch_rule",
    "convolution_backward_input_batch_rule",
    "convolution_backward_weight_batch_rule",
    "convolution_batch_rule",
    "cudnn_conv_per_sample_grad_rule",
    "install_rules",
    "kept_weight_grads",
    "plan",
    "slow_fallback",
    "uninstall_rules",
    "use_rules",
    "weight_grad_sq_norms",
    "weight_grad_sq_norms_and_sum",
    "weight_grads",
    "weighted_weight_grad",
]
