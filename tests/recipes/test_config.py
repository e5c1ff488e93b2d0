"""The closed schema: file, then command line, with errors a person can act on."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from psgrad import ConfigError
from recipes.config import Settings, from_command_line, from_table
from recipes.train_dp import DEFAULT, TrainDP


def written(folder, text):
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def read(path, *options):
    return from_command_line(TrainDP, DEFAULT, ["--config", str(path), *options])


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_is_valid(path):
    name = re.search(r"recipes/(\w+)\.py", path.read_text().splitlines()[0])[1]
    recipe = importlib.import_module(f"recipes.{name}")
    (kind,) = (value for value in vars(recipe).values() if _is_settings(value, recipe.__name__))
    from_table(kind, tomllib.loads(path.read_text()), path.name)


def _is_settings(value, module):
    return isinstance(value, type) and issubclass(value, Settings) and value.__module__ == module


def test_the_command_line_overrides_the_file(tmp_path):
    path = written(tmp_path, "epsilon = 2.0\nsteps = 7\n")
    settings = read(path, "--steps", "9", "--data-root", "somewhere", "--download")
    assert (settings.epsilon, settings.steps, settings.download) == (2.0, 9, True)
    assert settings.data_root == Path("somewhere")


def test_an_unknown_key_names_the_near_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"settings\.toml: unknown key 'epsilom'; did you mean epsilon"):
        read(written(tmp_path, "epsilom = 2.0\n"))


@pytest.mark.parametrize("options", [["--epsilon", "0"], ["--epsilon", "-1"], ["--steps", "0"]])
def test_an_option_out_of_range_names_the_key(tmp_path, options, capsys):
    with pytest.raises(SystemExit):
        read(written(tmp_path, ""), *options)
    message = capsys.readouterr().err
    assert options[0].removeprefix("--") in message
    assert "greater than" in message


def test_a_value_out_of_range_in_the_file_names_file_and_key(tmp_path):
    with pytest.raises(ConfigError, match=r"settings\.toml: epsilon = 0"):
        read(written(tmp_path, "epsilon = 0\n"))


def test_an_unknown_option_ends_with_the_near_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read(written(tmp_path, ""), "--epsilom", "1")
    message = capsys.readouterr().err
    assert "epsilon" in message
    assert "python -m recipes.train_dp --help" in message


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file .*nowhere\.toml"):
        read(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="is not TOML"):
        read(written(tmp_path, "epsilon 3"))
    with pytest.raises(ConfigError, match=r"cannot be read: .*directory"):
        read(tmp_path)
    (tmp_path / "settings.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"settings\.toml is not TOML"):
        read(tmp_path / "settings.toml")


def test_a_run_that_goes_on_takes_no_other_settings(tmp_path):
    assert from_command_line(TrainDP, DEFAULT, ["--resume", "run"]).resume == Path("run")
    with pytest.raises(ConfigError, match="leave out --max-grad-norm, --steps"):
        from_command_line(TrainDP, DEFAULT, ["--resume", "run", "--steps", "300", "--max-grad-norm", "2"])
    with pytest.raises(ConfigError, match="leave out --config"):
        read(written(tmp_path, DEFAULT.read_text()), "--resume", "run")
