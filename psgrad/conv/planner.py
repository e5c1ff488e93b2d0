"""Which strategy serves a problem: a pure choice from refusals and costs that explains itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from psgrad.conv.half import emulated, is_emulated
from psgrad.conv.problem import WeightGradProblem
from psgrad.conv.processor import halves_long_vectors, mkl_is_slow, short_vectors
from psgrad.conv.strategies import STRATEGIES, Cost, Verb

__all__ = ["ClippingChoice", "DeviceRates", "Plan", "choose", "rates_of", "seconds_of"]


@dataclass(frozen=True)
class DeviceRates:
    """What a device does per second: FLOPs of a good matrix product, bytes moved, and a call's price.

    Attributes
    ----------
    flops
        FLOP/s in float32.
    bytes
        Bytes/s of a large copy.
    call
        Seconds from calling an operator to its work beginning.

    """

    flops: float
    bytes: float
    call: float


RATES = {
    "cpu": DeviceRates(flops=2.5e11, bytes=2.0e10, call=2.1e-5),
    "cpu with AVX2": DeviceRates(flops=2.5e11, bytes=2.8e10, call=2.1e-5),
    "cpu of AMD with AVX-512": DeviceRates(flops=4.0e11, bytes=4.0e10, call=2.1e-5),
    "cpu of AMD with AVX-512 in halves": DeviceRates(flops=2.0e11, bytes=3.0e10, call=2.1e-5),
    "cuda": DeviceRates(flops=5.0e13, bytes=2.5e12, call=1.0e-5),
}
"""By kind of device; only their ratios enter a choice. Two cores each; a GPU's order of magnitude."""


@dataclass(frozen=True)
class ClippingChoice:
    """The two ways of clipping a layer, in estimated seconds: `print` shows which is faster, and why.

    Attributes
    ----------
    grads, norms
        The strategies that would make the gradients to keep, and the norms.
    kept_bytes
        Memory of the kept gradients.
    keep
        Seconds of making, squaring and adding up gradients that are kept.
    norm, weighted
        Seconds of the norms, and of one weighted sum after them.

    """

    grads: str
    norms: str
    kept_bytes: int
    keep: float
    norm: float
    weighted: float

    @property
    def keeps(self) -> bool:
        """Whether keeping the gradients is faster."""
        return self.keep < self.norm + self.weighted

    def __str__(self) -> str:
        """Both ways in a line each, the faster one marked."""
        keep, again = ("->", "  ") if self.keeps else ("  ", "->")
        return (
            f"{keep} clipping by keeping gradients about {1e3 * self.keep:.3g} ms: made by {self.grads},"
            f" {self.kept_bytes / 1e6:.3g} MB kept, squared and added up\n"
            f"{again} clipping by this sum again about {1e3 * (self.norm + self.weighted):.3g} ms:"
            f" {1e3 * self.norm:.3g} ms for norms by {self.norms}, then the sum"
        )


@dataclass(frozen=True)
class Plan:
    """A choice of strategy and the reasons for it. `print(plan)` shows both.

    Attributes
    ----------
    chosen
        Name of the strategy.
    verb
        What is to be computed.
    problem
        The normalised problem.
    seconds
        Estimated seconds of every strategy that can serve the problem.
    costs
        Their costs.
    refusals
        Why each of the others cannot.
    memory_budget
        Bytes that temporaries may take; None for no limit.
    at_once
        Samples taken at a time; None for all of them.
    clipping
        Of a weighted sum: whether clipping rather keeps gradients than takes norms and this sum.

    """

    chosen: str
    verb: Verb | Literal["weighted_sum"]
    problem: WeightGradProblem
    seconds: dict[str, float]
    costs: dict[str, Cost]
    refusals: dict[str, str]
    memory_budget: int | None = None
    at_once: int | None = None
    clipping: ClippingChoice | None = None

    def __str__(self) -> str:
        """One line for the problem, one per strategy."""
        p = self.problem
        head = (
            f"{self.verb} of a convolution: N={p.samples} K={p.rows_per_sample} G={p.groups} "
            f"O={p.out_per_group} I={p.in_per_group} kernel={p.geometry.kernel_size} T={p.output_size} "
            f"{p.dtype} on {p.device}"
        )
        if self.at_once is not None:
            head += f", {self.at_once} samples at a time"
        if self.memory_budget is not None:
            head += f" within {self.memory_budget} bytes"
        lines = [head]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: item[1]):
            cost = self.costs[name]
            mark = "->" if name == self.chosen else "  "
            lines.append(
                f"{mark} {name:8s} about {1e3 * seconds:.3g} ms: {cost.flops / 1e9:.3g} GFLOP"
                f" at 1/{_slowdown(cost, p):g} rate, {cost.bytes / 1e6:.3g} MB moved, {cost.calls} calls,"
                f" {cost.peak_bytes / 1e6:.3g} MB temporary"
            )
        lines += [f"   {name:8s} refused: {reason}" for name, reason in self.refusals.items()]
        if self.clipping is not None:
            lines.append(str(self.clipping))
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def choose(problem: WeightGradProblem, verb: Verb) -> Plan:
    """Plan a normalised problem: the strategy of least estimated time among those that can serve it."""
    seconds, costs, refusals = {}, {}, {}
    for name, strategy in STRATEGIES.items():
        reason = strategy.refusal(problem, verb)
        if reason is not None:
            refusals[name] = reason
            continue
        cost = strategy.cost(problem, verb)
        costs[name] = cost
        seconds[name] = seconds_of(cost, problem)
    chosen = min(seconds, key=lambda name: seconds[name])
    return Plan(chosen, verb, problem, seconds, costs, refusals)


def seconds_of(cost: Cost, problem: WeightGradProblem) -> float:
    """Estimated seconds on the problem's device."""
    rates = rates_of(problem)
    return (
        cost.flops * _slowdown(cost, problem) / rates.flops
        + cost.bytes / rates.bytes
        + cost.calls * rates.call
    )


def _slowdown(cost: Cost, problem: WeightGradProblem) -> float:
    """How many times slower than a good matrix product in float32 the arithmetic runs."""
    slow = not cost.fast_in_half and is_emulated(problem.dtype, problem.device)
    return cost.slowdown * emulated() if slow else cost.slowdown


def rates_of(problem: WeightGradProblem) -> DeviceRates:
    """Return the rates that costs are weighed with on the problem's device."""
    if problem.device.type == "cuda":
        return RATES["cuda"]
    if mkl_is_slow():
        return RATES["cpu of AMD with AVX-512" + (" in halves" if halves_long_vectors() else "")]
    return RATES["cpu with AVX2" if short_vectors() else "cpu"]
