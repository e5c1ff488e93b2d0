"""`ConvGeometry`: what torch's modules and functions mean by their arguments."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from psgrad.conv import ConvGeometry
from psgrad.errors import PsgradError, ShapeError
from tests import oracle
from tests.problems import conv_arguments

CONVOLUTIONS = {
    nn.Conv1d: (1, False),
    nn.Conv2d: (2, False),
    nn.Conv3d: (3, False),
    nn.ConvTranspose1d: (1, True),
    nn.ConvTranspose2d: (2, True),
    nn.ConvTranspose3d: (3, True),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@given(data=st.data())
def test_from_module_gives_the_module_s_output_size(kind: type[nn.Module], data: st.DataObject) -> None:
    rank, transposed = CONVOLUTIONS[kind]
    axes = st.tuples(*[st.integers(1, 3)] * rank)
    arguments = {
        "kernel_size": data.draw(axes),
        "stride": data.draw(axes),
        "dilation": data.draw(axes),
        "padding": data.draw(axes),
        "groups": data.draw(st.integers(1, 2)),
    }
    if transposed:
        arguments["output_padding"] = tuple(s - 1 for s in arguments["stride"])
    module = kind(4, 6, **arguments, device="meta")
    size = data.draw(st.tuples(*[st.integers(7, 11)] * rank))
    geometry = ConvGeometry.from_module(module)
    assert geometry.transposed == transposed
    assert geometry.groups == arguments["groups"]
    assert geometry.rank == rank
    assert geometry.output_size(size) == module(torch.empty(1, 4, *size, device="meta")).shape[2:]


@given(arguments=conv_arguments())
def test_output_size_is_that_of_the_convolution(arguments: tuple) -> None:
    x_shape, weight_shape, conv = arguments
    out = oracle.convolve(torch.zeros(1, *x_shape), torch.zeros(weight_shape), **conv)
    assert ConvGeometry(weight_shape[2:], **conv).output_size(x_shape[1:]) == out.shape[2:]


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_pads_where_torch_pads(kernel: int, dilation: int) -> None:
    weight = torch.randn(1, 1, kernel, dtype=torch.float64)
    x = torch.randn(1, 1, 9, dtype=torch.float64)
    geometry = ConvGeometry(kernel, padding="same", dilation=dilation)
    padded = F.pad(x, geometry.padding[0])
    expected = F.conv1d(x, weight, padding="same", dilation=dilation)
    torch.testing.assert_close(F.conv1d(padded, weight, dilation=dilation), expected)
    assert geometry.output_size((9,)) == (9,)


def test_same_and_valid_per_axis() -> None:
    geometry = ConvGeometry((2, 3), padding="same", dilation=(3, 1))
    assert geometry.padding == ((1, 2), (1, 1))
    assert not geometry.is_padding_symmetric
    assert geometry.symmetric_padding == (1, 1)
    assert ConvGeometry((2, 3), padding="valid").at((2, 3)).padding == ((0, 0), (0, 0))
    assert ConvGeometry.from_module(nn.Conv2d(1, 1, (2, 3), padding="same")).padding == ((0, 1), (1, 1))


def test_padding_of_another_mode_is_the_module_s_own() -> None:
    module = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    assert ConvGeometry.from_module(module).at((3, 3)).padding == ((0, 0), (0, 0))


def test_ints_stand_for_every_axis() -> None:
    geometry = ConvGeometry(3, stride=2, padding=1)
    assert geometry.at((3, 3)) == ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1), output_padding=(0, 0))
    assert geometry.output_size((9, 8)) == (5, 4)
    assert geometry.at((3, 3)).kernel_positions == 9


def test_geometry_is_a_frozen_value() -> None:
    geometry = ConvGeometry(3, padding=((1, 2),))
    assert hash(geometry) == hash(ConvGeometry((3,), 1, ((1, 2),)))
    with pytest.raises(FrozenInstanceError):
        geometry.groups = 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel_size": 0}, "kernel_size.*0"),
        ({"kernel_size": (3, 0)}, "kernel_size"),
        ({"kernel_size": ()}, "kernel_size"),
        ({"kernel_size": 3, "stride": 0}, "stride.*0"),
        ({"kernel_size": 3, "dilation": 0}, "dilation.*0"),
        ({"kernel_size": 3, "padding": -1}, "padding.*-1"),
        ({"kernel_size": 3, "padding": ((0, -1),)}, "padding"),
        ({"kernel_size": 3, "padding": "full"}, "full"),
        ({"padding": "same"}, "kernel_size"),
        ({"kernel_size": 3, "padding": "same", "transposed": True}, "same"),
        ({"kernel_size": 3, "padding": ((1, 2, 3),)}, "pair.*(1, 2, 3)"),
        ({"kernel_size": 3, "padding": ((0.5, 1),)}, "padding.*whole.*0.5"),
        ({"kernel_size": 3, "stride": (1.5, 2)}, "stride.*whole.*1.5"),
        ({"kernel_size": 3, "stride": 1.5}, "stride.*whole.*1.5"),
        ({"kernel_size": 3, "groups": 0}, "groups.*0"),
        ({"kernel_size": 3, "groups": 2.7}, "groups.*whole.*2.7"),
        ({"kernel_size": 3, "output_padding": 1}, "transposed"),
        ({"kernel_size": (3, 3), "stride": (1, 1, 1)}, "spatial axes"),
        ({"kernel_size": (3, 3), "padding": (1, 1, 1)}, "spatial axes"),
    ],
)
def test_bad_arguments_raise(arguments: dict, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        ConvGeometry(**arguments)
    assert isinstance(caught.value, PsgradError)
    assert isinstance(caught.value, ValueError)


def test_numbers_of_other_libraries() -> None:
    two = np.int64(2)
    geometry = ConvGeometry(two, (two, two), two, torch.tensor([2, 2]), groups=two)
    assert geometry == ConvGeometry(2, (2, 2), 2, (2, 2), groups=2)


def test_bad_use_raises() -> None:
    with pytest.raises(ShapeError, match="Linear is not a convolution"):
        ConvGeometry.from_module(nn.Linear(2, 2))
    with pytest.raises(ShapeError, match=r"kernel \(3, 3\).*\(5, 5\)"):
        ConvGeometry((3, 3)).at((5, 5))
    with pytest.raises(ShapeError, match=r"2 spatial axes.*have 1"):
        ConvGeometry(stride=(1, 2)).at((3,))
    with pytest.raises(ShapeError, match="no kernel_size"):
        ConvGeometry().output_size((4, 4))
    with pytest.raises(ShapeError, match="rank 2"):
        ConvGeometry((3, 3)).output_size((4, 4, 4))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        ConvGeometry((3, 3)).output_size((4, 2))


def test_what_was_looked_up_in_another_process_is_found_in_this_one() -> None:
    program = (
        "import pickle, sys; from psgrad.conv import ConvGeometry; "
        "g = ConvGeometry(padding=1); hash(g); sys.stdout.buffer.write(pickle.dumps(g))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    theirs = pickle.loads(done.stdout)
    assert {ConvGeometry(padding=1): "found"}[theirs] == "found"
