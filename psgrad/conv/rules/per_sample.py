"""The per-sample path: weight gradients of single samples by any strategy of `psgrad.conv`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from psgrad.conv.choice import check_strategy
from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.layout import move_batch_dim_to_front
from psgrad.conv.live import live_kernel
from psgrad.conv.planner import choose, rates_of
from psgrad.conv.problem import WeightGradProblem, problem_of
from psgrad.conv.rules.backward import Gradients, backward, compute_grad_bias, mask_of
from psgrad.conv.rules.call import Call
from psgrad.conv.rules.checks import check_backward
from psgrad.conv.rules.input_grad import input_grad
from psgrad.conv.verbs import weight_grads

__all__ = ["cudnn_conv_per_sample_grad_rule", "per_sample_backward", "per_sample_refusal"]

_CLEARLY_FASTER = 0.7
"""Part of the general rule's estimate that a strategy may take, to replace it.

On a Zen 4, of 32 samples: unfold is estimated at 0.67 for 256-256 3x3 @8 and at 0.68 for 128-256 3x3/2 @16,
and takes 0.47 and 0.72 of the general rule's time; at 0.77 for 64-128 1x1 @16, and takes 0.93.
"""


def per_sample_refusal(
    grad_output: Tensor, gbdim: int | None, x: Tensor, xbdim: int | None, wbdim: int | None
) -> str | None:
    """Why a backward pass is not one of single samples whose strategies may be used; None if it is.

    The precondition: grad_output and x batched, the weight not, one sample in every entry of `B`, and
    an x that is not empty. Strategies are planned for sizes that are numbers, write into buffers and leave
    no autograd graph, so they also need plain tensors: none of a dynamic shape, none that an outer
    `torch.func` transform wraps (nested vmap), and none whose gradient someone is recording (double
    backward from outside, forward-mode AD).
    Bdims are counted from the front.
    """
    if gbdim is None or xbdim is None or wbdim is not None:
        return "grad_output and x must be batched, and the weight not"
    samples = x.shape[1 if xbdim == 0 else 0]
    if samples != 1:
        return f"an entry of B holds {samples} samples, not one"
    if any(isinstance(size, torch.SymInt) for t in (x, grad_output) for size in t.shape):
        return "a size is a symbol: strategies are planned for numbers"
    if x.numel() == 0:  # without channels PyTorch's convolution gives an output without channels
        return "x is empty"
    if is_functorch_wrapped_tensor(x) or is_functorch_wrapped_tensor(grad_output):
        return "an outer transform wraps the tensors"
    if torch.is_grad_enabled() and (x.requires_grad or grad_output.requires_grad):
        return "the gradients of x or grad_output are being recorded"
    if forward_ad._current_level >= 0 and (_is_dual(x) or _is_dual(grad_output)):
        return "x or grad_output carries a tangent"
    return None


def cudnn_conv_per_sample_grad_rule(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    geometry: ConvGeometry,
    output_mask: Sequence[bool],
    strategy: str = "auto",
) -> Gradients:
    """`convolution_backward_batch_rule`, with per-sample weight gradients by a strategy.

    Where `per_sample_refusal` says None, the weight gradient is that of `psgrad.conv.weight_grads`:
    "unfold" is im2col and a matrix product with the groups kept apart, "grouped" the general rule
    (on CUDA the cuDNN path; the flags of `torch.backends.cudnn` hold), "auto" the planner's choice
    among those that do not refuse. Elsewhere the general rules give the same numbers, whatever the
    strategy; they are differentiable, a strategy's result is not.

    Parameters
    ----------
    grad_output, gbdim, x, xbdim, weight, wbdim, geometry, output_mask
        As for `convolution_backward_batch_rule`.
    strategy
        "auto", "measure" or a name of `psgrad.conv.strategies.STRATEGIES`.

    Returns
    -------
    tuple of three pairs
        As `convolution_backward_batch_rule`; the weight gradient of the per-sample path has bdim 0.

    Raises
    ------
    ShapeError
        If shapes, bdims or the geometry do not fit; the message has the shapes.
    StrategyError
        If the strategy does not exist, or was named and refuses; the message has its reason.

    """
    gbdim, xbdim, wbdim, call = check_backward(grad_output, gbdim, x, xbdim, weight, wbdim, geometry)
    check_strategy(strategy)
    mask = mask_of(output_mask)
    if not mask[1] or per_sample_refusal(grad_output, gbdim, x, xbdim, wbdim) is not None:
        return backward(grad_output, gbdim, x, xbdim, weight, wbdim, call, mask)
    return per_sample_backward(grad_output, gbdim, x, xbdim, weight, wbdim, call, mask, geometry, strategy)


def per_sample_backward(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    call: Call,
    output_mask: Sequence[bool],
    geometry: ConvGeometry,
    strategy: str,
) -> Gradients:
    """Do what that rule does where `per_sample_refusal` is None and the weight's gradient asked for."""
    assert gbdim is not None
    assert xbdim is not None
    want_x, _, want_bias = output_mask
    # B1(GO), B1(GI) -> B(GO), B(GI): B takes the place of the samples; B(GO)I comes back
    samples = move_batch_dim_to_front(x, xbdim).squeeze(1)
    sample_grads = move_batch_dim_to_front(grad_output, gbdim).squeeze(1)
    planned_on_cpu = strategy == "auto" and x.device.type == "cpu"
    if planned_on_cpu and _general_rule_serves(problem_of(samples, sample_grads, weight.shape, geometry)):
        return backward(grad_output, gbdim, x, xbdim, weight, wbdim, call, output_mask)
    grad_weight = weight_grads(samples, sample_grads, weight.shape, geometry, strategy)
    grad_bias = compute_grad_bias(grad_output, output_mask, gbdim)
    return (
        input_grad(grad_output, gbdim, x, xbdim, weight, wbdim, call) if want_x else (None, None),
        (grad_weight, 0),
        (grad_bias, 0 if want_bias else None),
    )


@lru_cache(maxsize=4096)
def _general_rule_serves(problem: WeightGradProblem) -> bool:
    """Whether no strategy promises to be clearly faster than the general rule.

    That is "grouped" in one call: what its chunks would hold in the cache, it writes in the library's own
    order and copies into ours, all results at once. Where a part of the kernel meets padding alone the
    strategies leave it out.
    """
    if live_kernel(problem) is not None:
        return False
    plan = choose(problem, "grads")
    copied = 2 * problem.samples * problem.gradient_bytes / rates_of(problem).bytes
    return plan.seconds[plan.chosen] > _CLEARLY_FASTER * (plan.seconds["grouped"] + copied)


def _is_dual(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None
