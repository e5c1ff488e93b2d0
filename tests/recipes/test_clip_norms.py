"""The label-noise recipe, on a tiny setting through its command line's entry."""

import json
import re

import pytest
import torch

from psgrad import GradNorms
from recipes import clip_norms
from recipes.clip_norms import mislabelled, sample_norms, separation
from recipes.models import small_cnn


def test_one_epoch_leaves_metrics_checkpoint_and_picture(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    lost = '{"way": "ordinary", "step": 7}\n'  # of a run that was killed
    (tmp_path / "run" / "metrics.jsonl").write_text(lost)
    assert clip_norms.main(["--epochs", "1", "--batch-size", "500", "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["way"], line["step"]) for line in lines] == [("ordinary", 1), ("clipped", 1)]
    assert lines[0]["clipped"] == 0 < lines[1]["clipped"] <= 1
    assert (tmp_path / "run" / "norms.png").read_bytes().startswith(b"\x89PNG")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["models"].keys() == {"ordinary", "clipped"}
    out = capsys.readouterr()
    for way in ("ordinary", "clipped"):
        assert re.search(rf"{way}: test accuracy [\d.]+%; a wrong label has the longer gradient", out.out)
        assert re.search(rf"{way}: 100%.*accuracy=[\d.]+%", out.err)
    assert "norms: 100%" in out.err


def test_labels_are_wrong_as_often_as_asked_and_never_by_chance_right():
    y = torch.randint(10, (20000,))
    wrong, labels = mislabelled(y, 0.3, 10, torch.Generator().manual_seed(0))
    assert wrong.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert ((labels != y) == wrong).all()
    assert labels[wrong].bincount(minlength=10).min() > 400


def test_norms_are_in_the_order_of_the_samples():
    model, x, y = small_cnn(1, 28, 28, 10), torch.randn(7, 1, 28, 28), torch.randint(10, (7,))
    norms = sample_norms(model, x, y)
    assert all(p.grad is None for p in model.parameters())
    with GradNorms(model) as monitor:
        torch.nn.functional.cross_entropy(model(x[5:6]), y[5:6]).backward()
    torch.testing.assert_close(norms[5:6], monitor.norms)


def test_separation_is_the_fraction_of_pairs():
    norms = torch.tensor([1.0, 2.0, 3.0, 0.5, 2.5])
    wrong = torch.tensor([False, False, False, True, True])
    assert separation(norms, wrong) == pytest.approx(2 / 6)
