"""The batch rules of convolution: what each operator does when some operands have one more axis.

`B` is the vmapped axis, `N` the samples, `G` the groups, `O` and `I` the output and input channels
per group; spatial axes are left out, and `(..)` is one merged axis, outer factor first. A weight is
`(GO)I`, that of a transposed convolution `(GI)O`. Every rule takes tensors with `B` at any position
(a `bdim`, or None when the tensor has no `B`) and returns tensors with theirs.
"""

from psgrad.conv.rules.backward import (
    compute_grad_bias,
    convolution_backward_batch_rule,
    slow_fallback,
)
from psgrad.conv.rules.forward import _convolution_batch_rule, convolution_batch_rule
from psgrad.conv.rules.input_grad import convolution_backward_input_batch_rule
from psgrad.conv.rules.per_sample import cudnn_conv_per_sample_grad_rule, per_sample_refusal
from psgrad.conv.rules.weight_grad import convolution_backward_weight_batch_rule

__all__ = [
    "_convolution_batch_rule",
    "compute_grad_bias",
    "convolution_backward_batch_rule",
    "convolution_backward_input_batch_rule",
    "convolution_backward_weight_batch_rule",
    "convolution_batch_rule",
    "cudnn_conv_per_sample_grad_rule",
    "per_sample_refusal",
    "slow_fallback",
]
