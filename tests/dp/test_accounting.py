"""P6: what is reported is spent."""

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from psgrad import ConfigError
from psgrad.dp import PrivacyEngine, PRVAccountant, epsilon_spent, noise_multiplier_for
from tests.dp.problems import private, train


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(3.0, 0.5, 60), (1.0, 0.01, 500), (8.0, 1.0, 20)])
def test_the_noise_multiplier_meets_the_target_from_below(epsilon, rate, steps):
    sigma = noise_multiplier_for(epsilon, 1e-5, sample_rate=rate, steps=steps)
    accountant = PRVAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=sigma, sample_rate=rate)
    spent = epsilon_spent(accountant, 1e-5)
    assert epsilon - 0.02 <= spent <= epsilon
    assert epsilon_spent(accountant, 1e-5) == spent  # reading changes nothing


def test_reported_epsilon_is_not_under_an_independent_accountant():
    accountant = PRVAccountant()
    for _ in range(100):
        accountant.step(noise_multiplier=1.1, sample_rate=0.05)
    event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.1))
    independent = PLDAccountant().compose(event, 100).get_epsilon(1e-5)
    assert epsilon_spent(accountant, 1e-5) >= independent - 0.02


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(3.0, 0.5, 60), (1.0, 0.01, 500), (8.0, 1.0, 20)])
def test_noise_by_renyi_divergence_keeps_the_target_and_is_more_than_prv_asks_for(epsilon, rate, steps):
    sigma = noise_multiplier_for(epsilon, 1e-5, sample_rate=rate, steps=steps, accountant="rdp")
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    assert PLDAccountant().compose(event, steps).get_epsilon(1e-5) <= epsilon
    assert RdpAccountant().compose(event, steps).get_epsilon(1e-5) <= epsilon + 0.02
    assert sigma >= noise_multiplier_for(epsilon, 1e-5, sample_rate=rate, steps=steps)


def test_an_accountant_that_is_no_bound_is_refused():
    with pytest.raises(ConfigError, match="gdp"):
        noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, steps=10, accountant="gdp")


def test_nothing_spent_before_the_first_step():
    assert epsilon_spent(PRVAccountant(), 1e-5) == 0


def test_a_step_without_noise_is_without_privacy():
    accountant = PRVAccountant()
    for noise_multiplier in (1.0, 0.0, 1.0):
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=0.1)
    assert epsilon_spent(accountant, 1e-5) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [{"target_epsilon": 0}, {"target_epsilon": -1}, {"target_delta": 0}, {"sample_rate": 1.5}, {"steps": 0}],
)
def test_impossible_targets_name_the_number(wrong):
    right = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "steps": 10}
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        noise_multiplier_for(**right | wrong)


def test_the_accountant_of_what_is_private_stays():
    """Another one would not know of the steps: an epsilon of 0."""
    engine = PrivacyEngine()
    engine.accountant = told = PRVAccountant()
    model, optimizer, loader = private(engine)
    with pytest.raises(ConfigError, match="accountant is set after make_private"):
        engine.accountant = PRVAccountant()
    with pytest.raises(AttributeError, match="accountant"):
        optimizer.accountant = PRVAccountant()
    train(model, optimizer, loader)
    assert engine.accountant is optimizer.accountant is told
    assert engine.get_epsilon(1e-5) > 0
