"""Norms through a weight that is computed row by row: standardised, normed, centred, scaled.

A row is what makes one output: `w[o]`, of K numbers. A sample's gradient r of it comes to a parameter by a
linear map, the transposed Jacobian. In all of these ways to compute a weight that map is, of every row,

    r -> scale r + B D B^T r      for a parameter of the weight's shape,
    r -> C B^T r                  for a parameter with one number a row (a gain),

where B has two columns: the constant direction, and the weight's own apart from it. Then the norm of what
arrives needs the norm of the gradient with its rows scaled, which layers' rules tell without writing it out,
and the products of B with it, which are sums over the output. No gradient is written, none carried over.
`psgrad.capture.row_probes` finds scale, D and C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from psgrad.conv.numerics import memory_order, squared_norms
from psgrad.layers import LayerCall, LayerRule

__all__ = ["RowBasis", "RowMap", "RowMaps"]

EATEN = {torch.float32: 0.03, torch.float64: 1e-6}
"""Where less of the scaled gradient's squared norm is left than this, it is computed in another way."""


@dataclass(frozen=True)
class RowMap:
    """How gradients of rows arrive at a parameter: `||map r||^2 = (scale ||r||)^2 + t^T form t`, t = B^T r.

    Attributes
    ----------
    scale
        `[O]`, or None for nothing.
    form
        `[O, 2, 2]`.

    """

    scale: Tensor | None
    form: Tensor


class RowMaps:
    """How gradients of a weight's rows arrive at every parameter behind it.

    Parameters
    ----------
    basis
        B.
    maps
        By parameter.

    """

    def __init__(self, basis: RowBasis, maps: Mapping[nn.Parameter, RowMap]) -> None:
        self._basis = basis
        self._maps = maps

    def sq_norms(self, rule: LayerRule, call: LayerCall, output: Tensor | None) -> dict[nn.Parameter, Tensor]:
        """Squared norms `[N]` by parameter, of a call of the layer with the weight; NaN where eaten.

        Parameters
        ----------
        rule, call
            The layer's.
        output
            What the call returned, if it is still there.

        """
        assert rule.output_axis is not None
        channels = [1] * call.g.ndim
        channels[rule.output_axis] = -1

        def of_scaled(scale: Tensor) -> Tensor:
            g = call.g * scale.to(call.g.dtype).view(channels)
            return rule.sq_norms(replace(call, g=g, wanted=("weight",)))["weight"]

        return self._norms(self._along(rule, call, output), of_scaled)

    def sq_norms_of(self, grads: Tensor) -> dict[nn.Parameter, Tensor]:
        """As `sq_norms`, of written-out gradients `[N, *weight.shape]`, in any memory order."""
        outside, inside = memory_order(grads)
        if inside[:1] != [1]:
            outside, inside = [], list(range(1, grads.ndim))
        rows = grads.permute(*outside, 0, *inside).unsqueeze(-1).flatten(len(outside) + 2)  # A.. N O J
        weight = self._basis.weight.permute([axis - 1 for axis in (*outside, *inside)])
        weight = weight.unsqueeze(-1).flatten(len(outside) + 1).unsqueeze(-3)  # A.. 1 O J

        def summed(t: Tensor) -> Tensor:
            return t.flatten(0, -3).sum(0) if outside else t

        squares = summed(squared_norms(rows.flatten(0, -2)).view(rows.shape[:-1]))
        along = self._basis.along(summed(rows.sum(-1)), summed(torch.linalg.vecdot(rows, weight)))
        return self._norms(along, lambda scale: (squares * scale.to(squares.dtype).square()).sum(1))

    def _norms(self, along: Tensor, of_scaled: Callable[[Tensor], Tensor]) -> dict[nn.Parameter, Tensor]:
        """Squared norms by parameter, from B^T r and what tells those of r with its rows scaled."""
        found = {}
        for p, to_p in self._maps.items():
            rest = _quadratic(to_p.form, along)
            found[p] = rest if to_p.scale is None else _sum(of_scaled(to_p.scale), rest)
        return found

    def _along(self, rule: LayerRule, call: LayerCall, output: Tensor | None) -> Tensor:
        """B^T r for every sample and row, from what the layer makes of a weight of ones, and of its own."""
        weight = self._basis.weight
        ones = weight.new_ones(getattr(call.module, "groups", 1), *weight.shape[1:])
        x = call.x.to(call.g.dtype)
        of_ones = _summed(rule, call, rule.forward(call.module, {"weight": ones, "bias": None}, x))
        bias = None if output is None else call.module._parameters["bias"]
        if output is None:
            output = rule.forward(call.module, {"weight": weight, "bias": None}, x)
        of_weight = _summed(rule, call, output)
        if bias is not None:
            of_weight = of_weight - bias.detach() * _summed(rule, call, None)
        return self._basis.along(of_ones, of_weight)


def _summed(rule: LayerRule, call: LayerCall, output: Tensor | None) -> Tensor:
    """Gradients of the output times an output of as many rows, or one for each group; summed: N O."""
    assert rule.output_axis is not None
    g = call.g.movedim(rule.output_axis, 1).unsqueeze(-1).flatten(2)  # (NK) O T
    if output is None:
        sums = g.sum(2)
    else:
        of = output.to(g.dtype).movedim(rule.output_axis, 1).unsqueeze(-1).flatten(2)  # (NK) O T, (NK) G T
        if of.shape == g.shape:
            sums = torch.linalg.vecdot(g, of)
        else:
            sums = torch.matmul(g.unflatten(1, (of.shape[1], -1)), of.unsqueeze(3)).flatten(1)
    return call.by_sample(sums).sum(1)


def _quadratic(form: Tensor, along: Tensor) -> Tensor:
    """O a b, N O a -> N."""
    return torch.einsum("noa,oab,nob->n", along, form.to(along.dtype), along)


def _sum(scaled: Tensor, rest: Tensor) -> Tensor:
    """Both added up; NaN where the sum is much less than the first."""
    total = scaled + rest.to(scaled.dtype)
    return total.masked_fill(total < EATEN[scaled.dtype] * scaled, torch.nan)


@dataclass(frozen=True)
class RowBasis:
    """The two directions of every row, orthonormal.

    Attributes
    ----------
    weight
        `[O, ...]`.
    mean, inverse
        `[O]`: the row's mean, and one over the norm of the rest (0 where there is none).

    """

    weight: Tensor
    mean: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> RowBasis:
        """Return that of a weight."""
        rows = weight.flatten(1)
        mean = rows.mean(1)
        squares = torch.linalg.vecdot(rows, rows) - rows.shape[1] * mean.square()
        return cls(weight, mean, torch.where(squares > 0, squares.rsqrt(), 0))

    @property
    def one(self) -> float:
        """An element of the first direction."""
        return self.weight[0].numel() ** -0.5

    def second(self) -> Tensor:
        """Return the second direction, `[O, K]`."""
        return (self.weight.flatten(1) - self.mean.unsqueeze(1)) * self.inverse.unsqueeze(1)

    def along(self, with_ones: Tensor, with_weight: Tensor) -> Tensor:
        """`[N, O]` products of r with ones and with the weight's row -> B^T r, `[N, O, 2]`."""
        return torch.stack([with_ones * self.one, (with_weight - self.mean * with_ones) * self.inverse], -1)
