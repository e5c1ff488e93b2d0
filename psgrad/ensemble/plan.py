"""How an ensemble runs, layer by layer: what `Ensemble.plan` returns and prints."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EnsemblePlan", "Step"]


@dataclass(frozen=True)
class Step:
    """One line of a plan: a layer or function, how its members were computed, and why."""

    name: str
    kind: str
    strategy: str
    why: str


@dataclass(frozen=True)
class EnsemblePlan:
    """Every layer's strategy, in the order of the forward pass.

    Attributes
    ----------
    members
        K.
    steps
        A layer or function each; one step for the whole module where it runs as a loop.
    refusal
        Why the whole module runs member after member; None if it is folded.

    """

    members: int
    steps: tuple[Step, ...]
    refusal: str | None

    def __str__(self) -> str:
        head = f"{self.members} members, " + (
            "folded" if self.refusal is None else f"one after the other: {self.refusal}"
        )
        width = max((len(step.name) for step in self.steps), default=0)
        kind = max((len(step.kind) for step in self.steps), default=0)
        lines = [
            f"  {step.name:{width}}  {step.kind:{kind}}  {step.strategy:15}  {step.why}"
            for step in self.steps
        ]
        return "\n".join([head, *lines])
