"""How gradients of a computed weight's rows arrive at the parameters behind it: found out, not known by name.

Each time, the map is applied to three random probes. Two tell the numbers of the form that
`psgrad.capture.row_maps` states, the third whether the map is of that form: another differs on random rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture.row_maps import RowBasis, RowMap, RowMaps

__all__ = ["row_maps"]

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
"""Of a row's norm: how far what arrives of a probe may be from the form."""
SEED = 0x70736772_6164
"""Of the random numbers; none that a model's weights may have been drawn with, which a row would be like."""
STEP = 7
"""By how much the rows of random numbers are shifted along one sequence of them."""


def row_maps(value: Tensor, leaves: Mapping[nn.Parameter, Tensor]) -> RowMaps | None:
    """Return how gradients of a computed weight's rows arrive at the parameters; None if in another way.

    Parameters
    ----------
    value
        The weight `[O, ...]` with its graph.
    leaves
        What stands for each parameter in the graph.

    """
    outputs, size = len(value), value.numel()
    if value.dtype not in TOLERANCE or value.ndim < 2 or size <= 2 * outputs:
        return None
    alike = [leaf.shape[:1] == value.shape[:1] and leaf.numel() == size for leaf in leaves.values()]
    by_row = [leaf.numel() == outputs for leaf in leaves.values()]
    if not all(a or b for a, b in zip(alike, by_row, strict=True)):
        return None
    basis = RowBasis.of(value.detach())
    probes = _Probes.of(basis)
    arrived = [_arrived(value, leaves, probe) for probe in probes.rows]
    maps = {}
    for p, is_alike, of_probes in zip(leaves, alike, zip(*arrived, strict=True), strict=True):
        to_p = _fitted(probes, of_probes) if is_alike else _fitted_by_row(probes, of_probes)
        if to_p is None:
            return None
        maps[p] = to_p
    return RowMaps(basis, maps)


@dataclass(frozen=True)
class _Probes:
    """Three sets of rows that a map is applied to: what the first two tell of it must hold for the third.

    Each is `across + along[0] * first direction + along[1] * second direction`, with numbers `along` that are
    random for every row: what arrives at a row from the others would not go with its own.

    Attributes
    ----------
    one
        An element of the first direction.
    second
        The second direction, `[O, K]`; 0 where there is none.
    across
        Random rows `[O, K]` of norm 1, orthogonal to both directions.
    along
        `[3, O, 2]`, of which the first two probes have one each.
    rows
        The probes, `[O, K]` each.

    """

    one: float
    second: Tensor
    across: Tensor
    along: Tensor
    rows: Sequence[Tensor]

    @classmethod
    def of(cls, basis: RowBasis) -> _Probes:
        """Make them, of random numbers that are always the same and nobody else's.

        What a weight is computed by cannot know them. The rows across are windows of one sequence.
        """
        second = basis.second()
        outputs, inputs = second.shape
        generator = torch.Generator(second.device).manual_seed(SEED)
        options: Any = {"generator": generator, "dtype": second.dtype, "device": second.device}
        sequence = torch.randn(STEP * outputs + inputs, **options)
        across = sequence.as_strided((outputs, inputs), (STEP, 1))
        across = across - across.mean(1, keepdim=True)
        across.addcmul_(second, _column(torch.linalg.vecdot(across, second)), value=-1)
        across.div_(_column(_norms(across)))
        along = torch.rand(3, outputs, 2, **options) + 0.5
        along[0, :, 1] = along[1, :, 0] = 0
        rows = [cls._put(across, basis.one, second, each) for each in along]
        return cls(basis.one, second, across, along, rows)

    @staticmethod
    def _put(rows: Tensor, one: float, second: Tensor, along: Tensor) -> Tensor:
        return torch.addcmul(rows, second, _column(along[:, 1])).add_(_column(along[:, 0] * one))

    def product(self, rows: Tensor) -> Tensor:
        """B^T r, O K -> O 2."""
        return torch.stack([rows.sum(1) * self.one, torch.linalg.vecdot(rows, self.second)], 1)

    def are(self, found: Tensor, scale: Tensor, along: Tensor) -> bool:
        """Whether rows are `scale * across + B along`, but for rounding."""
        rest = torch.addcmul(found, self.across, _column(scale), value=-1)
        rest.addcmul_(self.second, _column(along[:, 1]), value=-1).sub_(_column(along[:, 0] * self.one))
        return bool((_norms(rest) <= TOLERANCE[found.dtype] * _norms(found)).all())


def _arrived(value: Tensor, leaves: Mapping[nn.Parameter, Tensor], probe: Tensor) -> list[Tensor]:
    """What arrives of a probe `[O, K]` at each leaf, a row for each row: `[O, K]`, or `[O, 1]`."""
    grads = torch.autograd.grad(
        value, list(leaves.values()), probe.view_as(value), retain_graph=True, materialize_grads=True
    )
    return [grad.reshape(len(value), -1) for grad in grads]


def _fitted(probes: _Probes, found: Sequence[Tensor]) -> RowMap | None:
    """Return the map of a parameter of the weight's shape, or None if it is none of the form."""
    scale = torch.linalg.vecdot(found[0], probes.across)
    columns = []  # of D
    for axis in (0, 1):
        rest = probes.product(found[axis]) - _column(scale) * probes.along[axis]
        columns.append(rest / _column(probes.along[axis, :, axis]))
    d = torch.stack(columns, 2)
    put = probes.along[2]
    if not probes.are(found[2], scale, _column(scale) * put + (d @ put.unsqueeze(2)).squeeze(2)):
        return None
    return RowMap(scale, scale.view(-1, 1, 1) * (d + d.mT) + d.mT @ d)


def _fitted_by_row(probes: _Probes, found: Sequence[Tensor]) -> RowMap | None:
    """Return the map of a parameter with one number a row, or None if it is none of the form."""
    numbers = torch.cat(list(found), 1)  # O 3
    vector = numbers[:, :2] / torch.stack([probes.along[0, :, 0], probes.along[1, :, 1]], 1)
    rest = numbers[:, 2] - torch.linalg.vecdot(vector, probes.along[2])
    if not bool((rest.abs() <= TOLERANCE[numbers.dtype] * numbers.abs().amax(1)).all()):
        return None
    return RowMap(None, _column(vector) * vector.unsqueeze(2))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _column(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(1)
