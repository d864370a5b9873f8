"""Recipes: TOML files whose keys are a command's option names. What is typed overrides the file."""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from pathlib import Path
from typing import Any

import click

# What belongs to one machine or one call, and to no recipe.
_NOT_IN_FILES = ("config", "resume", "restart_from", "out", "runs", "data_dir", "json_path")


def read_recipe(path: Path, command: click.Command) -> dict[str, Any]:
    """The options in a recipe, by parameter name; `random-T` and `random_T` are the same key.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, or a key is unknown or its value of the wrong type; each with what is allowed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not TOML: not text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    allowed = {str(p.name): p for p in command.params if isinstance(p, click.Option) and p.name not in _NOT_IN_FILES}
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in _NOT_IN_FILES or key == "json":
            raise ValueError(f"{path}: {key} belongs to one machine or one call, not to a recipe: type it as an option")
        if name not in allowed:
            raise ValueError(f"{path}: unknown key {key!r}{_hint(name, allowed)}; allowed are {', '.join(allowed)}")
        if name in options:
            raise ValueError(f"{path}: {key} is there twice, once as {name}")
        _check_type(path, key, value, allowed[name])
        options[name] = value
    return options


def _hint(name: str, allowed: dict[str, click.Option]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_type(path: Path, key: str, value: Any, option: click.Option) -> None:
    if option.is_flag:
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(option.type, click.types.IntParamType):
        fits, wanted = type(value) is int, "a whole number"
    elif isinstance(option.type, click.types.FloatParamType):
        fits, wanted = type(value) in (int, float), "a number"
    else:
        fits, wanted = isinstance(value, str), "a text in quotes"
        if isinstance(value, list) and value and all(type(item) is int for item in value):
            joined = ",".join(map(str, value))
            wanted += f', such as "{joined}"'
    if not fits:
        raise ValueError(f"{path}: {key} is {reprlib.repr(value)}; it must be {wanted} ({option.help})")


def _use_recipe(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        ctx.default_map = read_recipe(path, ctx.command)
    return path


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,  # before the options whose defaults it holds
    callback=_use_recipe,
    help="A recipe: a TOML file of these options (examples/recipes); options on the command line override it.",
)


def is_typed(ctx: click.Context, name: str) -> bool:
    """Whether an option was typed."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether an option was typed, or stands in the recipe."""
    source = click.core.ParameterSource
    return ctx.get_parameter_source(name) in (source.COMMANDLINE, source.DEFAULT_MAP)
