"""Opacus's own tests, from its wheel, with psgrad in its tables: what passes without passes with."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ("-p", "tests.interop.opacus_plugin")
QUICK = (
    "grad_samples.conv1d_test",
    "grad_samples.conv2d_test",
    "grad_samples.conv3d_test",
    "grad_samples.group_norm_test",
    "grad_samples.linear_test",
    "grad_sample_module_test",
    "grad_sample_hooks_test",
    "grad_sample_module_fast_gradient_clipping_test",
    "grad_sample_hooks_fast_gradient_clipping_test",
    "per_sample_gradients_utils_test",
)
LONG = (
    "grad_samples.instance_norm2d_test",
    "grad_samples.embedding_test",
    "grad_samples.dp_rnn_test",
    "grad_samples.dp_multihead_attention_test",
    "gradient_accumulation_test",
    "batch_memory_manager_test",
    "privacy_engine_test",
    "mixed_precision_test",
)


def run(modules, report, *plugin):
    """Exit status, outcome by test ("passed", "failed", "error", "skipped"), and what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *plugin]
    command += ["-c", os.devnull, "--rootdir", str(ROOT), "--hypothesis-seed=0", f"--junitxml={report}"]
    command += ["--pyargs", *(f"opacus.tests.{module}" for module in modules)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = bad[0] if bad else "passed"
    return done.returncode, outcomes, done.stdout + done.stderr


def counts(output):
    """Convolution verbs that psgrad computed, by name."""
    line = re.search(r"computed by psgrad: (.*)", output)
    return {name: int(number) for name, number in (part.split() for part in line[1].split(", "))}


@pytest.mark.parametrize(
    "modules", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_what_passes_without_psgrad_passes_with_it(modules, tmp_path):
    status, outcomes, output = run(modules, tmp_path / "with.xml", *PLUGIN)
    assert len(outcomes) > 20, output
    assert counts(output)["weight_grads"] > 100, output
    bad = {test for test, outcome in outcomes.items() if outcome in ("failure", "error")}
    if status or bad:
        _, alone, _ = run(modules, tmp_path / "without.xml")
        assert not {test for test in bad if alone[test] == "passed"}, output
        assert status == pytest.ExitCode.TESTS_FAILED, output


def test_a_run_in_which_psgrad_computes_nothing_fails(tmp_path):
    status, outcomes, output = run(["grad_samples.linear_test"], tmp_path / "with.xml", *PLUGIN)
    assert set(outcomes.values()) == {"passed"}, output
    assert status == pytest.ExitCode.TESTS_FAILED, output
