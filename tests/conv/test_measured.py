"""Measured choices: timed once, remembered, and never in the way."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from psgrad.conv import ConvGeometry, measured, plan, use_rules, weight_grad_sq_norms, weight_grads
from psgrad.conv.strategies import STRATEGIES
from psgrad.errors import StrategyError

ARGUMENTS = (torch.randn(4, 3, 7, 7), torch.randn(4, 5, 7, 7), (5, 3, 3, 3), ConvGeometry(3, padding=1))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSGRAD_CACHE", str(tmp_path))
    return tmp_path / "measured.json"


@pytest.fixture
def timings(monkeypatch):
    """Count the problems that are timed."""
    real, seen = measured._time, []

    def counted(plan):
        seen.append(plan.verb)
        return real(plan)

    monkeypatch.setattr(measured, "_time", counted)
    return seen


def test_the_fastest_of_the_timed_is_chosen(empty_cache):
    found = plan(*ARGUMENTS, "grads", strategy="measure")
    timed = next(iter(json.loads(empty_cache.read_text())["seconds"].values()))
    assert timed[found.chosen] <= measured.ALIKE * min(timed.values())
    assert {name: found.seconds[name] for name in timed} == timed
    assert "loop" in str(found)


@pytest.mark.parametrize("faster", [1.02, 1.1])
def test_two_that_take_the_same_are_decided_by_their_costs(faster, monkeypatch):
    by_cost = plan(*ARGUMENTS, "grads").chosen
    other = next(name for name in plan(*ARGUMENTS, "grads").seconds if name != by_cost)
    monkeypatch.setattr(measured, "_time", lambda plan: {by_cost: faster, other: 1.0})
    assert plan(*ARGUMENTS, "grads", strategy="measure").chosen == (by_cost if faster < 1.03 else other)


def test_a_problem_is_timed_once_also_across_processes(timings, monkeypatch):
    for _ in range(3):
        weight_grads(*ARGUMENTS, "measure")
    assert timings == ["grads"]
    weight_grad_sq_norms(*ARGUMENTS, "measure")
    assert timings == ["grads", "sq_norms"]
    monkeypatch.setattr(measured, "_CHOICES", measured._Choices())  # as in a new process
    weight_grads(*ARGUMENTS, "measure")
    assert timings == ["grads", "sq_norms"]


def test_results_are_those_of_the_loop():
    x, grad, *rest = ARGUMENTS
    expected = weight_grads(x, grad, *rest, "loop")
    torch.testing.assert_close(weight_grads(x, grad, *rest, "measure"), expected)


CORRUPT = [
    "{",
    "[]",
    "[" * 10_000,
    '{"schema": 0, "seconds": {}}',
    '{"schema": 1}',
    '{"schema": 1, "seconds": {"problem": {"loop": 1' + "0" * 400 + "}}}",
]


@pytest.mark.parametrize("content", CORRUPT, ids=lambda content: content[:50])
def test_a_file_that_is_corrupt_or_stale_is_passed_over(empty_cache, timings, content):
    empty_cache.write_text(content)
    with pytest.warns(UserWarning, match="passed over"):
        weight_grads(*ARGUMENTS, "measure")
    assert timings == ["grads"]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, timings):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PSGRAD_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match=r"passed over|not kept"):
        weight_grads(*ARGUMENTS, "measure")
    weight_grads(*ARGUMENTS, "measure")
    assert timings == ["grads"]  # remembered by this process


def test_a_user_without_a_home(monkeypatch, timings, tmp_path):
    for name in ("PSGRAD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    weight_grads(*ARGUMENTS, "measure")
    assert timings == ["grads"]
    assert (tmp_path / "psgrad" / "measured.json").exists()


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_choice_that_no_longer_exists_is_timed_again(empty_cache, timings, monkeypatch):
    weight_grads(*ARGUMENTS, "measure")
    content = json.loads(empty_cache.read_text())
    for entry in content["seconds"].values():
        entry["abandoned"] = 0.0
    empty_cache.write_text(json.dumps(content))
    monkeypatch.setattr(measured, "_CHOICES", measured._Choices())
    assert plan(*ARGUMENTS, "grads", strategy="measure").chosen in STRATEGIES
    assert timings == ["grads", "grads"]


def test_an_empty_batch_is_not_timed(timings):
    x, grad, *rest = ARGUMENTS
    assert weight_grads(x[:0], grad[:0], *rest, "measure").shape == (0, 5, 3, 3, 3)
    assert timings == []


def test_a_named_strategy_leaves_nothing_to_plan():
    with pytest.raises(StrategyError, match=r"'loop' leaves nothing to plan: use auto or measure"):
        plan(*ARGUMENTS, "grads", strategy="loop")


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_a_problem_is_timed_under_a_vmap_too_whatever_it_says_of_random_numbers(timings, randomness):
    x, weight = torch.randn(4, 1, 3, 7, 7), torch.randn(5, 3, 3, 3)

    def loss(weight, x):
        return torch.conv2d(x, weight).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0), randomness=randomness)
    expected, before = per_sample(weight, x), torch.get_rng_state()
    with use_rules("measure"):
        found = per_sample(weight, x)
    assert timings == ["grads"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)
