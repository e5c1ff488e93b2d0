"""A process that computes under memory budgets and prints the peaks: `python -m tests.conv.budget_peaks`.

A line is `layer | verb | strategy | budget | measured bytes beside the result`.
"""

from dataclasses import replace

import torch

from psgrad.bench.memory import peak_bytes
from psgrad.conv import ConvGeometry, weight_grad_sq_norms, weight_grads, weighted, weighted_weight_grad
from psgrad.conv.budget import sample_bytes, sum_bytes
from psgrad.conv.problem import problem_of
from psgrad.conv.scratch import _blocks
from psgrad.conv.strategies import STRATEGIES
from psgrad.conv.sum_planner import plan_sum

NOISE = 2**19
"""Bytes that a process grows by without being asked."""

# channels, spatial size, kernel, stride, padding, groups, dtype
LAYERS = {
    "3x3": (64, 64, (32, 32), 3, 1, 1, 1, torch.float32),
    "3x3 deep": (256, 256, (8, 8), 3, 1, 1, 1, torch.float32),
    "first": (3, 64, (64, 64), 7, 2, 3, 1, torch.float32),
    "uneven": (32, 32, (40, 40), 4, 1, ((1, 2), (1, 2)), 1, torch.float32),
    "1x1": (128, 256, (28, 28), 1, 1, 0, 1, torch.float32),
    "cropped": (512, 512, (1, 1), 3, 1, 1, 1, torch.float32),
    "depthwise": (96, 96, (28, 28), 7, 1, 3, 96, torch.float32),
    "groups, bfloat16": (128, 128, (28, 28), 3, 1, 1, 32, torch.bfloat16),
    "3x3, bfloat16": (64, 64, (32, 32), 3, 1, 1, 1, torch.bfloat16),
    "3x3, float64": (32, 32, (32, 32), 3, 1, 1, 1, torch.float64),
    "audio": (1, 128, (16000,), 10, 5, 0, 1, torch.float32),
    "video": (64, 64, (4, 14, 14), 3, 1, 1, 1, torch.float32),
}
SAMPLES = 6


def main() -> None:
    """Compute each verb by each strategy within the smallest budget, and four times as much."""
    for layer, (inputs, outputs, size, kernel, stride, padding, groups, dtype) in LAYERS.items():
        geometry = ConvGeometry((kernel,) * len(size), stride, padding, groups=groups)
        out = ConvGeometry((kernel,) * len(size), (stride,) * len(size), geometry.padding).output_size(size)
        x = torch.randn(SAMPLES, inputs, *size).to(dtype)
        grad = torch.randn(SAMPLES, outputs, *out).to(dtype)
        arguments = (x, grad, (outputs, inputs // groups, *geometry.kernel_size), geometry)
        problem = problem_of(*arguments)
        factors = torch.linspace(0, 1, SAMPLES)

        def summed(x, grad, shape, geometry, how, *, memory_budget, factors=factors):
            found = plan_sum(problem_of(x, grad, shape, geometry))
            fixed, each = sum_bytes(problem_of(x, grad, shape, geometry), how)
            at_once = min(SAMPLES, (memory_budget - fixed) // each)
            weighted.plan_sum = lambda *_: replace(found, chosen=how, at_once=at_once)
            return weighted_weight_grad(x, grad, shape, geometry, factors)

        for how in plan_sum(problem).seconds:
            fixed, each = sum_bytes(problem, how)
            for budget in (fixed + each, fixed + 4 * each):
                measure(layer, "weighted_sum", how, budget, summed, arguments)
        for verb, compute in (("grads", weight_grads), ("sq_norms", weight_grad_sq_norms)):
            for name, strategy in STRATEGIES.items():
                if strategy.refusal(problem, verb) is not None:
                    continue
                least = sample_bytes(strategy, problem, verb)
                for budget in (least, 4 * least):
                    measure(layer, verb, name, budget, compute, arguments)


def measure(layer, verb, name, budget, compute, arguments) -> None:
    """Print a line; the first call compiles a library's kernels."""
    compute(*arguments, name, memory_budget=budget)
    _blocks.by_purpose.clear()
    result, peak = peak_bytes(lambda: compute(*arguments, name, memory_budget=budget), torch.device("cpu"))
    own = result.untyped_storage().nbytes()
    print(" | ".join((layer, verb, name, str(budget), str(peak - own))))


if __name__ == "__main__":
    main()
