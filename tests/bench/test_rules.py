"""The benchmark of the batch rules: complete, gated, and on the rules it says."""

from itertools import combinations

import pytest
import torch

from psgrad.bench import rules
from psgrad.bench.rules import RULE_CASES, RuleCase, measure_rule_case


def test_every_combination_of_batched_operands_is_there():
    backward = {"".join(letters) for n in (1, 2, 3) for letters in combinations("gxw", n)}
    assert {c.batched for c in RULE_CASES if c.operator == "backward"} == backward
    assert {c.batched for c in RULE_CASES if c.operator == "forward"} >= {"x", "w", "xw"}
    assert {(c.groups > 1, c.transposed) for c in RULE_CASES} == {
        (grouped, transposed) for grouped in (False, True) for transposed in (False, True)
    }
    assert len({c.name for c in RULE_CASES}) == len(RULE_CASES)


def small(operator, batched, **more):
    return RuleCase(operator, batched, "small", channels=4, size=(5, 5), batch=2, **more)


@pytest.mark.parametrize("batched", ["g", "x", "w", "gx", "gw", "xw", "gxw"])
def test_backward_cases_are_measured(batched):
    (result,) = measure_rule_case(small("backward", batched), rounds=2)
    assert result.reason is None
    assert len(result.measurement.ratios) == 2


def test_the_per_sample_path_is_measured_by_every_strategy():
    results = measure_rule_case(small("backward", "gx", samples=1), rounds=1)
    assert [r.contender for r in results] == ["psgrad", "loop", "grouped", "unfold"]


def test_a_rule_that_differs_gets_no_number(monkeypatch):
    real = rules.use_rules
    inside = []

    class Wrong:
        def __init__(self, strategy):
            self.context = real(strategy)

        def __enter__(self):
            inside.append(True)
            return self.context.__enter__()

        def __exit__(self, *error):
            inside.pop()
            return self.context.__exit__(*error)

    monkeypatch.setattr(rules, "use_rules", Wrong)
    convolution = torch.convolution
    monkeypatch.setattr(
        torch, "convolution", lambda *a: convolution(*a) * (1.01 if inside else 1)
    )  # twice: the rule calls it too
    (result,) = measure_rule_case(small("forward", "x"), rounds=1)
    assert "differs by 2.0e-02" in result.reason
    assert result.measurement is None
