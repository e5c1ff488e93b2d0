"""The recipe of the models table, on the smallest model."""

import json

import pytest

from psgrad import ConfigError
from recipes.models_table import main


def run(folder, *options):
    where = ["--results", str(folder / "results" / "models.json"), "--out", str(folder / "models.md")]
    return main(["--models", "squeezenet1_1", *where, *options])


def test_a_run_renews_what_it_compares_and_keeps_the_rest(tmp_path):
    assert run(tmp_path, "--contenders", "Opacus", "psgrad") == 0
    path = tmp_path / "results" / "models.json"
    first = json.loads(path.read_text())
    assert first["models"]["squeezenet1_1"]["outcomes"]["psgrad"]["verdict"] == "right"
    first["models"]["squeezenet1_1"]["outcomes"]["Opacus"]["reason"] = "ValueError: a | b\nmore"
    first["models"]["alexnet"] = {"outcomes": {}, "parameters": 61e6}
    path.write_text(json.dumps(first))
    assert run(tmp_path, "--contenders", "psgrad") == 0
    page = (tmp_path / "models.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "right" in lines["squeezenet1_1"]
    assert "raises (1)" in lines["squeezenet1_1"]
    assert "1. `ValueError: a | b`" in page
    assert "not compared" in lines["alexnet"]
    assert "psgrad: 1 right, of 1 compared" in page


def test_a_model_too_large_is_not_compared(tmp_path):
    assert run(tmp_path, "--contenders", "psgrad", "--max-parameters", "1") == 0
    record = json.loads((tmp_path / "results" / "models.json").read_text())
    assert record["models"]["squeezenet1_1"]["outcomes"] == {}


def test_a_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="resnet17"):
        main(["--models", "resnet17"])


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "models.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"models\.json"):
        run(tmp_path)
