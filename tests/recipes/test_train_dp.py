"""The main job through its command line, on a tiny setting."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

TINY = ["--steps", "4", "--augmentations", "2", "--sample-rate", "0.02", "--evaluate-every", "2"]


def run(*options, check=True):
    command = [sys.executable, "-m", "recipes.train_dp", *map(str, options)]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(*TINY, "--out", folder), folder


def test_the_last_line_says_what_was_bought(whole):
    done, _ = whole
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"epsilon ([\d.]+), delta 0.0001, test accuracy [\d.]+%, \d+ seconds", last)
    assert found, last
    assert 2.9 <= float(found[1]) <= 3.0


def test_the_folder_holds_metrics_checkpoint_and_picture(whole):
    _, folder = whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert 0 < lines[0]["epsilon"] < lines[1]["epsilon"] <= 3
    assert all(0 <= line["clipped"] <= 1 and 0 < line["loss"] < 10 for line in lines)
    assert (folder / "privacy.png").read_bytes().startswith(b"\x89PNG")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4
    assert saved["optimizer"]["noise_multiplier"] > 0  # a setting, and nothing of the noise itself
    assert not any(
        "noise" in key or "generator" in key for key in saved["optimizer"].keys() - {"noise_multiplier"}
    )


def test_the_bar_shows_loss_epsilon_and_clipped(whole):
    for part in (r"loss=[\d.]+", r"epsilon=[\d.]+", r"clipped=\d+%"):
        assert re.search(part, whole[0].stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_resumed_and_continues_epsilon(tmp_path, number):
    folder = tmp_path / "run"
    options = ["--steps", "400", "--sample-rate", "0.02", "--evaluate-every", "2", "--out", folder]
    command = [sys.executable, "-m", "recipes.train_dp", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"go on with --resume {folder}" in out
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    stopped = saved["step"]
    assert 4 <= stopped < 400
    # the saved settings say 400 steps; make the rest short
    saved["settings"]["steps"] = stopped + 2
    torch.save(saved, folder / "checkpoint.pt")

    run("--resume", folder)
    after = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert after["step"] == stopped + 2
    assert sum(steps for *_, steps in after["optimizer"]["accountant"]["history"]) == stopped + 2
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    epsilons = [line["epsilon"] for line in lines]
    assert epsilons == sorted(epsilons)


def test_without_noise_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """P7, bit for bit: the noise alone differs between two runs of a seed."""
    from recipes import train_dp

    monkeypatch.setattr(train_dp, "noise_multiplier_for", lambda *_, **__: 0.0)
    monkeypatch.setattr(train_dp, "epsilon_spent", lambda *_: 0.0)
    for name, steps in (("whole", "4"), ("parts", "2")):
        train_dp.main([*TINY, "--seed", "0", "--steps", steps, "--out", str(tmp_path / name)])
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    saved["settings"]["steps"] = 4
    torch.save(saved, tmp_path / "parts" / "checkpoint.pt")
    train_dp.main(["--resume", str(tmp_path / "parts")])
    whole, parts = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "parts"))
    for key in ("model", "averaged"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)


def test_an_empty_batch_is_a_step(tmp_path):
    """With 0.4 images expected, two of three batches are; each is noise, and accounted (P4)."""
    from recipes import train_dp

    options = ["--steps", "20", "--evaluate-every", "1", "--sample-rate", "0.0001"]  # all full: 2e-10
    train_dp.main([*TINY, *options, "--out", str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert sum(steps for *_, steps in saved["optimizer"]["accountant"]["history"]) == 20
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line["loss"] == 0 for line in lines)  # no image: there was an empty one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cifar10"], "--data-root"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--resume", "nowhere"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_clear_error(options, message):
    done = run(*options, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_in_use_is_not_overwritten(whole):
    done = run(*TINY, "--out", whole[1], check=False)
    assert done.returncode == 1
    assert "holds a run already" in done.stderr
