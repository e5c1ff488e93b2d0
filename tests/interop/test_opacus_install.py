"""Installing psgrad in Opacus and taking it out again leaves no trace."""

import re
from pathlib import Path

import pytest
from opacus.grad_sample import (
    GradSampleModule,
)
from torch import nn

from psgrad.errors import ConfigError
from psgrad.interop import opacus
from tests.interop.opacus_cases import (
    case,
    state,
)
from tests.model_oracle import grads_one_by_one, squared_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.usefixtures("tables_as_they_were"),
]


def test_modules_that_were_wrapped_before_take_part_at_once():
    model, x = case("2d, circular")
    expected = grads_one_by_one(model, squared_loss, (x,))["weight"]
    engine = GradSampleModule(model)

    def error():
        engine.zero_grad()
        squared_loss(engine, x).backward()
        return (model.weight.grad_sample - expected).norm() / expected.norm()

    assert error() > 0.1
    with opacus.use():
        assert error() < 1e-12
    assert error() > 0.1


def test_twice_is_as_good_as_once():
    before = state()
    opacus.install()
    after = state()
    opacus.install()
    assert state() == after
    opacus.uninstall()
    assert state() == before
    opacus.uninstall()
    assert state() == before
    assert not opacus.installed()


def test_use_leaves_the_tables_as_they_were_after_an_exception():
    before = state()

    def fails_inside():
        with opacus.use(opacus.EVERY_LAYER):
            assert state() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert state() == before


def test_use_inside_of_install_removes_only_what_it_added():
    opacus.install()
    inside = state()
    with opacus.use(opacus.EVERY_LAYER):
        assert opacus.installed() == set(opacus.EVERY_LAYER)
    assert state() == inside
    with opacus.use():
        pass
    assert opacus.installed() == set(opacus.CONVOLUTIONS)
    opacus.uninstall()


def test_what_others_registered_meanwhile_stays():
    def theirs(layer, activations, backprops):
        raise AssertionError

    table = GradSampleModule.GRAD_SAMPLERS
    own = table[nn.Conv1d]
    with opacus.use():
        table[nn.Conv1d] = theirs
    assert table[nn.Conv1d] is theirs
    table[nn.Conv1d] = own


def test_a_layer_that_psgrad_does_not_take_over_is_refused():
    with pytest.raises(ConfigError, match="not Embedding, BatchNorm2d"):
        opacus.install([nn.Conv2d, nn.Embedding, nn.BatchNorm2d])
    assert not opacus.installed()


def test_the_example_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "opacus.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "docs/opacus.md", "exec"), {"__name__": "__main__"})
    assert not opacus.installed()
