"""A recipe's settings: a TOML file, then the command line, one closed schema for both."""

from __future__ import annotations

import argparse
import difflib
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from psgrad import ConfigError, PsgradError

__all__ = ["Count", "Positive", "Settings", "from_command_line", "from_table", "run_recipe"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

AnySettings = TypeVar("AnySettings", bound="Settings")


class Settings(BaseModel):
    """Base of every recipe's settings: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def from_table(kind: type[AnySettings], table: dict[str, Any], source: str) -> AnySettings:
    """Return settings from a table of keys.

    Raises
    ------
    ConfigError
        Naming `source` and every key that is unknown (with the nearest known ones) or out of range.

    """
    try:
        return kind.model_validate(table)
    except ValidationError as err:
        raise ConfigError("\n".join(f"{source}: {_explain(kind, e)}" for e in err.errors())) from err


def from_command_line(
    kind: type[AnySettings], default: Path, argv: Sequence[str] | None = None
) -> AnySettings:
    """Return the settings of `--config FILE`, `default` without one, overridden by the other options.

    Raises
    ------
    ConfigError
        If the file is missing, cannot be read, is no TOML, or does not fit the schema; or if a run is to
        `resume`, whose settings are its own, with others. A wrong option ends the program with a message of
        the command-line parser.

    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=default)
    known, rest = first.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        table = tomllib.loads(known.config.read_text())
    except FileNotFoundError as err:
        raise ConfigError(f"there is no configuration file {known.config}") from err
    except OSError as err:
        raise ConfigError(f"the configuration file cannot be read: {err}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{known.config} is not TOML: {err}") from err
    settings = from_table(kind, table, str(known.config))
    chosen = tyro.cli(
        kind,
        default=settings,
        args=rest,
        prog=f"python -m recipes.{default.stem}",  # whose configuration it is
        description=f"{kind.__doc__}\n\n--config FILE reads another TOML file first; now: {known.config}",
    )
    if getattr(chosen, "resume", None) is not None:
        others = [name for name in kind.model_fields if getattr(chosen, name) != getattr(settings, name)]
        others = ["config"] * (known.config != default) + [name for name in others if name != "resume"]
        if others:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise ConfigError(f"--resume goes on with the settings of the run's start: leave out {options}")
    return from_table(kind, chosen.model_dump(), "command line")


def run_recipe(main: Callable[[], int]) -> None:
    """End the program with the exit status of a recipe, or with one line that says what is wrong."""
    try:
        sys.exit(main())
    except PsgradError as error:
        sys.exit(f"error: {error}")


def _explain(kind: type[Settings], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{key} = {error['input']!r}: {error['msg']}"
    near = difflib.get_close_matches(key, kind.model_fields, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(kind.model_fields)}"
    return f"unknown key {key!r}; {hint}"
