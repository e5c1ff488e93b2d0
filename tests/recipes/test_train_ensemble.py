"""The ensemble's recipe through its command line, on a tiny setting."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psgrad import ConfigError
from recipes import train_ensemble
from recipes.config import from_command_line
from recipes.ensemble_report import reliability, scores
from recipes.train_ensemble import TrainEnsemble

TINY = ["--members", "2", "--batch-size", "400", "--epochs", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "recipes.train_ensemble", *TINY, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, folder


def test_it_reports_mean_members_scores_and_seconds(whole: tuple[str, Path]) -> None:
    said, folder = whole
    assert re.search(r"test accuracy of the mean [\d.]+%, of the members [\d.]+% to [\d.]+%", said)
    assert re.search(r"NLL [\d.]+, ECE [\d.]+, Brier [\d.]+", said)
    assert re.search(r"\d+ seconds; one member after the other: about \d+ \([\d.]+x\)", said)
    assert "members=" in said
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_and_resumed_equals_uninterrupted(
    whole: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step, calls = train_ensemble.step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 13:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train_ensemble, "step", interrupted)
    folder = tmp_path / "run"
    assert train_ensemble.main([*TINY, "--out", str(folder)]) == 0
    assert f"epoch 1 is saved, go on with --resume {folder}" in capsys.readouterr().out
    train_ensemble.main(["--resume", str(folder)])
    one, other = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole[1], folder))
    # Not bitwise: the first call of an ensemble runs folded also where later ones loop, and rounds otherwise.
    torch.testing.assert_close(other["ensemble"], one["ensemble"], rtol=1e-4, atol=1e-5)
    assert torch.equal(other["loader"]["generators"], one["loader"]["generators"])


def test_a_sweep_names_the_best_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--learning-rates", "1e-6", "0.1", "--out", str(tmp_path / "run")]
    train_ensemble.main(options)
    assert "best: learning rate 0.1, member 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_ensemble", "sweep_ensemble"])
def test_the_committed_configurations_are_possible(name: str) -> None:
    settings = from_command_line(TrainEnsemble, train_ensemble.DEFAULT.with_stem(name), [])
    assert not settings.learning_rates or len(settings.learning_rates) == settings.members


def test_rates_that_are_not_one_a_member_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 for 2 members"):
        train_ensemble.main([*TINY, "--learning-rates", "0.1", "--out", str(tmp_path)])


def test_scores_and_reliability_by_hand() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    labels = torch.tensor([0, 1])
    found = scores(probabilities, labels)
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(torch.tensor([0.8, 0.4]).log().mean().item()))
    assert found["brier"] == pytest.approx((0.04 * 2 + 0.36 * 2) / 2)
    assert found["ece"] == pytest.approx((0.2 + 0.6) / 2)
    confidence, accuracy, counts = reliability(probabilities, labels)
    assert (confidence, accuracy, counts) == (pytest.approx([0.6, 0.8]), [0.0, 1.0], [1, 1])
