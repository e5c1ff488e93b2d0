"""What a layer rule is: a layer's own three verbs, given its input and its output's gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from psgrad.conv.numerics import accumulation_dtype, drop_removed, per_row, squared_norms, weighted

__all__ = [
    "LayerCall",
    "LayerRule",
    "accumulation_dtype",
    "drop_removed",
    "per_row",
    "sample_sum",
    "squared_norms",
    "weighted",
]


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer, as its backward saw it.

    Attributes
    ----------
    module
        The layer.
    x
        Its input `[(N K), ...]`, detached.
    g
        The gradient of its output `[(N K), ...]`.
    rows_per_sample
        K, the consecutive rows that make one sample.
    wanted
        Names of the layer's own parameters whose gradients are asked for.
    saved
        What `LayerRule.own_backward` computed beside the input's gradient, `[(N K), ...]`, or nothing.

    """

    module: nn.Module
    x: Tensor
    g: Tensor
    rows_per_sample: int
    wanted: tuple[str, ...]
    saved: tuple[Tensor, ...] = ()

    @property
    def samples(self) -> int:
        """N."""
        return self.x.shape[0] // self.rows_per_sample

    def by_sample(self, t: Tensor) -> Tensor:
        """(NK).. -> NK.."""
        return t.reshape(self.samples, self.rows_per_sample, *t.shape[1:])


class LayerRule(ABC):
    """Per-sample gradients of one type of layer. Rules keep no state.

    `grads` is what a rule must say; `sq_norms` and `weighted_sum` follow from it, and a rule
    overrides them where there is a way that does not write every gradient.
    """

    looks_up: ClassVar[bool] = False
    """Whether the input only tells which rows of the weight the output has, so that samples may share it."""
    output_axis: ClassVar[int | None] = None
    """Which axis of the output has an entry for each row of the weight, linear in it; None if none has.

    A row is what stands along axis 0 of the weight. `forward` takes any number of rows (any to a group).
    """

    def refusal(self, module: nn.Module) -> str | None:
        """Why the settings of this module make per-sample gradients impossible, or None."""
        return None

    def input_error(self, module: nn.Module, x: Tensor) -> str | None:
        """What is wrong with an input, seen as a batch, or None."""
        return None if x.ndim else "the input has no batch axis"

    @abstractmethod
    def forward(self, module: Any, params: Mapping[str, Tensor | None], x: Tensor, *args: Any) -> Tensor:
        """Compute the layer's output with these values of its parameters."""

    def has_own_backward(self, module: nn.Module, x: Tensor) -> bool:
        """Whether `forward_saving` and `own_backward` take the place of `forward` and its autograd.

        Worth it where the input's gradient and the parameters' have work in common.
        """
        return False

    def forward_saving(
        self, module: Any, params: Mapping[str, Tensor | None], x: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the output, and what of it `own_backward` takes; autograd does not record it."""
        raise NotImplementedError

    def own_backward(
        self,
        module: Any,
        params: Mapping[str, Tensor | None],
        x: Tensor,
        saved: tuple[Tensor, ...],
        g: Tensor,
        *,
        to_input: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Compute the gradient of x, if asked for, and what the verbs take from `LayerCall.saved`."""
        raise NotImplementedError

    @abstractmethod
    def grads(self, call: LayerCall) -> dict[str, Tensor]:
        """Per-sample gradient `[N, *shape]` of every wanted parameter."""

    def sq_norms(self, call: LayerCall) -> dict[str, Tensor]:
        """Squared norm `[N]` per wanted parameter, float32 at least."""
        return {name: squared_norms(grad) for name, grad in self.grads(call).items()}

    def weighted_sum(self, call: LayerCall, factors: Tensor) -> dict[str, Tensor]:
        """`sum_n factors[n] * grads[n]` per wanted parameter, in the parameter's shape.

        A factor of exactly 0 removes its sample, also one that is not finite.
        """
        return {name: weighted(factors, grad) for name, grad in self.grads(call).items()}

    def norms_and_sums(self, call: LayerCall) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Squared norms as of `sq_norms` and plain sums over the samples, for who does not clip.

        None, the default, where they have no work in common; or if there is no sample.
        """
        return None

    def kept_grads(self, call: LayerCall) -> dict[str, Tensor]:
        """As `grads`, dense, but in any order of the axes in memory: clipping only squares and sums."""
        return self.grads(call)

    def keeps_grads(self, call: LayerCall) -> bool:
        """Whether clipping should hold the written-out gradients between norms and sum, not x and g.

        By default where they take no more memory.
        """
        size = sum(p.numel() for name in call.wanted if (p := call.module._parameters[name]) is not None)
        return call.samples * size <= call.x.numel() + call.g.numel()


def sample_sum(call: LayerCall, t: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Sum `[(N K), ...]` over the rows of each sample and all axes but 0 and `keep`.

    The sum is kept in float32 at least and returned in the dtype of `t`.
    """
    axes = [1, *(axis + 1 for axis in range(1, t.ndim) if axis not in keep)]
    return call.by_sample(t).sum(axes, dtype=accumulation_dtype(t.dtype)).to(t.dtype)
