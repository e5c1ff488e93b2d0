"""What scripts ask Opacus's wrapper and optimizer for: `model._module`, on a model that nothing wraps."""

import copy
import pickle
import re

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from psgrad import ConfigError, PsgradError
from psgrad.clipping import AdaptiveQuantile
from psgrad.dp.optimizer_names import INSTEAD
from tests.dp.problems import backward, dataset, network, private


def step(model: nn.Module, samples: int) -> None:
    backward(model, *dataset(samples)[:])


def test_the_module_inside_is_the_model_and_nothing_else_sees_it():
    stock = network()
    model, _, _ = private(model=copy.deepcopy(stock))
    assert model._module is model
    assert list(model.state_dict()) == list(stock.state_dict())
    assert list(dict(model.named_modules())) == list(dict(stock.named_modules()))
    assert list(dict(model.named_parameters())) == list(dict(stock.named_parameters()))
    assert repr(model) == repr(stock)
    assert torch.compile(model, backend="eager")._module is model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_names_of_its_own(copied):
    model, optimizer, _ = private()
    other = copied(model)
    assert other._module is other
    step(model, 2)
    step(other, 2)
    other.zero_grad()
    assert optimizer.clip.gathered.samples == 2
    assert other.to_standard_module() is other
    assert not optimizer.clip.removed


@pytest.mark.parametrize("name", ["cleanup", "remove_hooks", "to_standard_module"])
def test_detaching_by_the_wrapper_s_names_leaves_nothing(name):
    model, optimizer, _ = private()
    returned = getattr(model, name)()
    assert returned in (None, model)
    assert optimizer.clip.removed
    assert not any(hasattr(model, other) for other in ("_module", "cleanup", "to_standard_module"))
    assert vars(model).keys() == vars(network()).keys()
    step(model, 2)  # ordinary gradients again
    assert all(p.grad is not None for p in model.parameters())
    private(model=model)


def test_a_name_of_the_model_s_own_stays():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self._module = nn.Linear(5, 3)

        def forward(self, x):
            return self._module(x)

        def cleanup(self):
            return "its own"

    model, optimizer, _ = private(model=Own())
    assert isinstance(model._module, nn.Linear)
    assert model.cleanup() == "its own"
    optimizer.clip.remove()
    assert isinstance(model._module, nn.Linear)


def test_the_model_s_zero_grad_forgets_what_was_gathered():
    """As with Opacus, whose wrapper drops per-sample gradients there."""
    style = AdaptiveQuantile(1.0, expected_batch_size=4.0, count_noise=0.0)
    model, optimizer, _ = private(max_grad_norm=style, noise_multiplier=0.0)
    step(model, 3)
    model.zero_grad()
    assert optimizer.clip.gathered.samples == 0
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(PsgradError, match="without a clipped gradient"):
        optimizer.step()
    step(model, 2)
    assert optimizer.clip.gathered.samples == 2
    optimizer.step()


def test_a_frozen_parameter_s_gradient_is_dropped_too():
    model = network()
    model[0].weight.requires_grad_(False)
    model, _, _ = private(model=model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model.zero_grad()
    assert model[0].weight.grad is None


def test_a_model_that_opacus_has_wrapped_is_taken_out():
    """Its hooks would go on, and hold every batch's per-sample gradients."""
    inner = network()
    model, optimizer, _ = private(model=GradSampleModule(inner))
    assert model is inner
    step(model, 2)
    optimizer.step()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_what_the_optimizer_has_not_names_what_has():
    _, optimizer, _ = private()
    assert optimizer.params == optimizer.parameters
    assert optimizer.loss_reduction == "mean"
    for name, instead in INSTEAD.items():
        assert hasattr(DPOptimizer, name) or name in ("step_hook", "virtual_step", "secure_mode")
        with pytest.raises(AttributeError, match=f"has no attribute '{name}': {re.escape(instead)}"):
            getattr(optimizer, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'parms'$"):
        _ = optimizer.parms


def test_options_of_opacus_s_adaptive_clipping_are_told_where_they_are():
    options = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "unclipped_num_std": 1.0}
    with pytest.raises(
        ConfigError, match=r"target_unclipped_quantile is quantile, clipbound_learning_rate is"
    ):
        private(clipping="adaptive", min_clipbound=0.1, max_clipbound=9.0, **options)
