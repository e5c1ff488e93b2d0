"""What the rules ask of their operands; checked once, at the door of each public function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from psgrad.conv.geometry import ConvGeometry
from psgrad.conv.rules.call import Call, call_of
from psgrad.errors import ShapeError

__all__ = ["check_backward", "check_forward"]

_Named = tuple[str, Tensor, int | None]


def check_forward(
    x: Tensor,
    x_bdim: int | None,
    weight: Tensor,
    weight_bdim: int | None,
    bias: Tensor | None,
    bias_bdim: int | None,
    geometry: ConvGeometry,
) -> tuple[int | None, int | None, int | None, Call]:
    """Return the bdims, none negative, and the call.

    Raises
    ------
    ShapeError
        If anything does not fit; the message has the shapes.

    """
    operands: list[_Named] = [("x", x, x_bdim), ("weight", weight, weight_bdim)]
    if bias is not None:
        operands.append(("bias", bias, bias_bdim))
    bdims = _bdims(operands)
    call, channels, _ = _fit(operands, bdims, geometry)
    if bias is None:
        return bdims[0], bdims[1], None, call
    if _logical_shape(bias, bdims[2]) != (channels,):
        raise ShapeError(f"the bias must have {channels} elements, one per channel: {_describe(operands)}")
    return bdims[0], bdims[1], bdims[2], call


def check_backward(
    grad_output: Tensor,
    gbdim: int | None,
    x: Tensor,
    xbdim: int | None,
    weight: Tensor,
    wbdim: int | None,
    geometry: ConvGeometry,
) -> tuple[int | None, int | None, int | None, Call]:
    """Return the bdims of grad_output, x and weight, none negative, and the call.

    Raises
    ------
    ShapeError
        If anything does not fit; the message has the shapes.

    """
    operands: list[_Named] = [("x", x, xbdim), ("weight", weight, wbdim), ("grad_output", grad_output, gbdim)]
    bdims = _bdims(operands)
    call, channels, output_size = _fit(operands, bdims, geometry)
    samples = _logical_shape(x, bdims[0])[0]
    if _logical_shape(grad_output, bdims[2]) != (samples, channels, *output_size):
        raise ShapeError(
            f"grad_output must be {(samples, channels, *output_size)} without its B: {_describe(operands)}"
        )
    return bdims[2], bdims[0], bdims[1], call


def _bdims(operands: Sequence[_Named]) -> list[int | None]:
    """Bdims counted from the front, after seeing that they exist and that `B` is one length.

    Raises
    ------
    ShapeError
        If they do not, or it is not.

    """
    bdims: list[int | None] = []
    lengths = set()
    for name, t, bdim in operands:
        if bdim is None:
            bdims.append(None)
            continue
        if not isinstance(bdim, int):
            raise ShapeError(f"bdim {bdim!r} of {name} is neither an int nor None: {_describe(operands)}")
        if not -t.ndim <= bdim < t.ndim:
            raise ShapeError(f"bdim {bdim} of {name} is out of range: {_describe(operands)}")
        bdims.append(bdim % t.ndim)
        lengths.add(t.shape[bdim])
    if len(lengths) > 1:
        raise ShapeError(f"the batch axes have different lengths: {_describe(operands)}")
    return bdims


def _fit(
    operands: Sequence[_Named], bdims: Sequence[int | None], geometry: ConvGeometry
) -> tuple[Call, int, tuple[int, ...]]:
    """See that x and weight belong to the geometry; return the call and the output's C and size.

    A bias, which is added, may be of another dtype.

    Raises
    ------
    ShapeError
        If they do not.

    """
    if len({t.dtype for name, t, _ in operands if name != "bias"}) > 1:
        dtypes = ", ".join(f"{name} is {t.dtype}" for name, t, _ in operands)
        raise ShapeError(f"{dtypes}; cast them to one dtype: {_describe(operands)}")
    x = _logical_shape(operands[0][1], bdims[0])
    weight = _logical_shape(operands[1][1], bdims[1])
    if len(x) != len(weight) or not 3 <= len(x) <= 5:
        raise ShapeError(
            "need two channel or sample axes and the same 1 to 3 spatial axes in x and weight,"
            f" B not counted: {_describe(operands)}"
        )
    groups = geometry.groups
    try:
        call = call_of(geometry, weight[2:])
        output_size = _output_size(geometry, weight[2:], x[2:])
    except ShapeError as error:
        raise ShapeError(f"{error}: {_describe(operands)}") from error
    in_channels = weight[0] if geometry.transposed else weight[1] * groups
    if weight[0] % groups or x[1] != in_channels:
        raise ShapeError(f"x and weight do not fit with groups={groups}: {_describe(operands)}")
    return call, weight[1] * groups if geometry.transposed else weight[0], output_size


@lru_cache(maxsize=1024)
def _output_size(
    geometry: ConvGeometry, kernel_size: tuple[int, ...], input_size: tuple[int, ...]
) -> tuple[int, ...]:
    return geometry.at(kernel_size).output_size(input_size)


def _logical_shape(t: Tensor, bdim: int | None) -> tuple[int, ...]:
    shape = tuple(t.shape)
    return shape if bdim is None else (*shape[:bdim], *shape[bdim + 1 :])


def _describe(operands: Sequence[_Named]) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)}" + ("" if bdim is None else f" with bdim {bdim}")
        for name, t, bdim in operands
    )
